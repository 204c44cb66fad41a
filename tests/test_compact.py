"""Latents in bfloat16 and features in 8 bits: half the bytes, the same batches whatever the cache held before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import OpenTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepa_cli.data.cache import Cache, DamagedEntryError
from crepa_cli.data.compact import in_int8, restored_features
from crepa_cli.data.dataset import ClipDataset
from crepa_cli.data.healing import Healing
from crepa_cli.data.prepare import prepare
from crepa_cli.data.prompts import prompt_key
from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.events import drained
from crepa_cli.models.family import Family
from crepa_cli.profile import CrepaSettings, FeatureDtype

WIDE, NARROW = torch.float32, torch.bfloat16
NUMBERS = st.floats(-60000, 60000, width=16)


@given(rows=st.lists(st.lists(NUMBERS, min_size=5, max_size=5), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_feature_in_8_bits_is_off_by_half_a_level_of_its_token_at_most(rows: list[list[float]]) -> None:
    features = torch.tensor(rows).half()
    stored = in_int8(features)
    assert stored["features"].dtype == torch.int8
    level = features.double().abs().amax(-1, keepdim=True) / 127
    error = (restored_features(stored).double() - features.double()).abs()
    rounding = features.double().abs() * 2**-10 + 2**-24
    assert (error <= level * 0.5 + rounding).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_has_no_finite_scale(value: float) -> None:
    features = torch.ones(2, 3).half()
    features[1, 2] = value
    assert in_int8(features)["feature_scales"].isfinite().tolist() == [True, False]


def prepared(
    family: Family, crepa: CrepaSettings, clips: Path, cache: Cache, dtype: torch.dtype, features: FeatureDtype
) -> list[PreparedClip]:
    form, device = ClipForm(32, 32, 9, 8), torch.device("cpu")
    work = prepare(family, clips, form, crepa, [""], cache, device, dtype, feature_dtype=features)
    return drained(work, lambda _: None)


def tensors_read(family: Family, clips: list[PreparedClip], cache: Cache, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the first clip as training gets them."""
    batch = ClipDataset(clips, cache, prompt_key(family, "", dtype), dtype).batch([0], [0.0], with_features=True)
    assert batch.features is not None
    return batch.tensors | {"features": batch.features}


def sizes(cache: Cache, kind: str) -> dict[Path, int]:
    return {path.relative_to(cache.root): path.stat().st_size for path in (cache.root / kind).rglob("*.safetensors")}


# Wan has a condition beside the latents, CogVideoX draws noise for each clip.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("wan", "i2v"), ("cogvideox", "t2v")])
def test_a_run_in_bfloat16_reads_the_same_from_new_entries_and_from_those_of_earlier_versions(
    name: str, task: str, open_tiny: OpenTiny, tiny_dinov2: Path, short_clips: Path, tmp_path: Path
) -> None:
    family = open_tiny(name, task)
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2), encoder_image_size=28)
    old, new = Cache(tmp_path / "old"), Cache(tmp_path / "new")
    wide = prepared(family, crepa, short_clips, old, WIDE, "float16")
    before = sizes(old, "latents")
    from_old = prepared(family, crepa, short_clips, old, NARROW, "float16")
    assert sizes(old, "latents") == before
    assert [clip.latents_key for clip in from_old] == [clip.latents_key for clip in wide]
    from_new = prepared(family, crepa, short_clips, new, NARROW, "float16")
    assert len(sizes(new, "latents")) == len(before)
    exact = tensors_read(family, wide, old, WIDE)
    one, other = tensors_read(family, from_old, old, NARROW), tensors_read(family, from_new, new, NARROW)
    for key, tensor in exact.items():
        assert one[key].equal(other[key]), key
        if key != "prompt_embeds":
            assert one[key].dtype == tensor.dtype, key
            torch.testing.assert_close(one[key], tensor, rtol=2**-8, atol=0)
    assert not one["latents"].equal(exact["latents"])
    again = prepared(family, crepa, short_clips, new, WIDE, "float16")
    assert tensors_read(family, again, new, WIDE)["latents"].equal(exact["latents"])


def test_features_in_8_bits_have_entries_of_half_the_size_of_their_own(
    open_tiny: OpenTiny, tiny_dinov2: Path, short_clips: Path, tmp_path: Path
) -> None:
    family, cache = open_tiny("wan", "t2v"), Cache(tmp_path / "cache")
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2), encoder_image_size=112)
    exact = prepared(family, crepa, short_clips, cache, WIDE, "float16")
    before = sizes(cache, "features")
    coarse = prepared(family, crepa, short_clips, cache, WIDE, "int8")
    added = {path: size for path, size in sizes(cache, "features").items() if path not in before}
    assert len(added) == len(before) == 3
    width = 48
    assert sum(added.values()) / sum(before.values()) == pytest.approx((width + 4) / (2 * width), rel=0.05)
    one, other = (tensors_read(family, clips, cache, WIDE)["features"] for clips in (exact, coarse))
    assert one.dtype == other.dtype == torch.float16
    assert one.shape == other.shape
    assert torch.cosine_similarity(one.double(), other.double(), dim=-1).min() > 0.9999


@pytest.mark.parametrize("kind", ["latents", "features"])
def test_a_compact_entry_is_made_again_as_it_was(
    kind: str, open_tiny: OpenTiny, tiny_dinov2: Path, short_clips: Path, tmp_path: Path
) -> None:
    family, cache = open_tiny("cogvideox", "t2v"), Cache(tmp_path / "cache")
    crepa = CrepaSettings(block_index=1, encoder=str(tiny_dinov2), encoder_image_size=28)
    (clip, *_) = prepared(family, crepa, short_clips, cache, NARROW, "int8")
    key = clip.latents_key if kind == "latents" else str(clip.features_key)
    path, whole = cache.path(kind, key), cache.read(kind, key)
    path.write_bytes(path.read_bytes()[:-1])
    Healing(family, crepa, cache, NARROW, "int8").heal(DamagedEntryError(path, kind, key, "cut off"), clip)
    again = cache.read(kind, key)
    assert again.keys() == whole.keys()
    assert all(again[name].dtype == whole[name].dtype and again[name].equal(whole[name]) for name in whole)
