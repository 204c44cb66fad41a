"""Memory that a card has left is spent on activations that are kept in place of recomputed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recompute import settings as published_settings
from steps import Plan
from test_fit import plan  # noqa: F401  # a fixture

from crepa_cli.memory.fit import Work, fastest_fit
from crepa_cli.memory.prediction import training_memory
from crepa_cli.memory.savings import Setting, with_settings
from crepa_cli.memory.shapes import form_bucket
from crepa_cli.models import load_family

GPU = torch.device("cuda")
KEEP, ALL = Setting("memory", "keep", "attention"), Setting("memory", "keep", "all")
CHECKPOINTING = Setting("train", "activation_checkpointing", True)


@pytest.mark.slow
def test_more_is_kept_as_the_card_grows(plan: Plan) -> None:  # noqa: F811
    blocks = 6
    plan = replace(plan, config={**plan.config, "num_layers": blocks})
    profile = with_settings(plan.profile(), [CHECKPOINTING])
    family = plan.open_family(profile, torch.device("cpu"))
    bucket = form_bucket(profile, family)

    def peak(*settings: Setting) -> int:
        return sum(training_memory(with_settings(profile, settings), family, bucket, GPU).values())

    lowest, highest = peak(), peak(ALL)
    assert lowest < peak(KEEP) < highest
    fits = [fastest_fit(profile, family, bucket, GPU, lowest + (highest - lowest) * part // 4) for part in range(5)]
    kept, saved = [], []
    for fit in fits:
        assert fit is not None
        assert fit.peak <= fit.limit
        memory = fit.profile.memory
        if memory.keep_blocks < blocks:
            one_more = Setting("memory", "keep_blocks", memory.keep_blocks + 1)
            assert peak(*fit.settings, one_more) > fit.limit
        kept.append(memory.keep_blocks)
        saved.append(fit.saved)
    assert kept == sorted(kept)
    assert saved == sorted(saved)
    assert kept[-1] == blocks
    assert saved[0] < saved[-1] == pytest.approx(Work.of(profile, family, bucket).forward)
    assert all("what is kept saves" in fit.price for fit in fits if fit is not None and fit.saved)


def test_flops_are_about_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Wan 1.3B at its default size, as `tests/benchmarks/recompute.py` counts them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    family = load_family("wan")("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v")
    profile = published_settings(family, {})
    work = Work.of(profile, family, form_bucket(profile, family))
    counted = {"nothing": 1160e12, "attention": 962e12, "all": 874e12}
    for keep, flops in counted.items():
        found = work.flops(with_settings(profile, [Setting("memory", "keep", keep)]))
        assert found == pytest.approx(flops, rel=0.03)
    finer = with_settings(profile, [Setting("memory", "finer_recompute", True)])
    assert work.flops(finer) == pytest.approx(1445e12, rel=0.03)
