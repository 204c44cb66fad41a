"""The VAE's posterior, its tiles and its dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenTiny, moving_pattern
from torch import Tensor

from crepa_cli.data.buckets import Bucket
from crepa_cli.data.cache import Cache
from crepa_cli.data.prepare import prepare
from crepa_cli.data.scan import ClipForm, PreparedClip
from crepa_cli.demo.clips import write_demo_clips
from crepa_cli.events import drained
from crepa_cli.memory.preparation import vae_peak
from crepa_cli.models.family import Family
from crepa_cli.models.vae import encoded_latents
from crepa_cli.runs.checks import open_family
from crepa_cli.settings import resolve


def opened(family: Family, *settings: str) -> Family:
    """The tiny checkpoint, opened with further settings."""
    flags = {"model.family": family.name, "model.checkpoint": family.base.name, "model.task": family.task}
    sizes = ["data.width=96", "data.height=96", "validation.every=0"]
    return open_family(resolve("t2v", flags, [*sizes, *settings]).profile)


def prepared_latents(family: Family, clips: Path, cache: Cache) -> list[Tensor]:
    """The cached latents of two clips."""
    work = prepare(family, clips, ClipForm(96, 64, 9, 16), None, [""], cache, torch.device("cpu"), torch.float32)
    done: list[PreparedClip] = drained(work, lambda _: None)
    return [cache.read("latents", clip.latents_key)["latents"] for clip in done]


@torch.no_grad()
def test_latents_of_ltx_are_the_same_sample_of_the_posterior_in_every_cache(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    family = open_tiny("ltxvideo", "t2v")
    write_demo_clips(tmp_path / "clips", count=2)
    first, again = (prepared_latents(family, tmp_path / "clips", Cache(tmp_path / name)) for name in ("a", "b"))
    assert all(map(torch.equal, first, again))

    video, vae = moving_pattern(9, 64, 96), family.load_vae_pipeline().vae
    generator = torch.Generator().manual_seed(3)
    published = vae.encode(video[None]).latent_dist
    torch.testing.assert_close(encoded_latents(vae, video, generator), published.sample(generator.manual_seed(3))[0])
    assert torch.equal(encoded_latents(vae, video, None), published.mode()[0])


def test_caches_of_earlier_versions_are_used_where_latents_are_what_they_were(open_tiny: OpenTiny) -> None:
    assert opened(open_tiny("wan", "t2v")).encoding == {}
    assert opened(open_tiny("sanavideo", "t2v")).encoding == {}
    assert opened(open_tiny("ltxvideo", "t2v")).encoding == {"posterior": "sample"}
    assert opened(open_tiny("kandinsky5_video", "t2v")).encoding == {"tiling": True}
    assert opened(open_tiny("kandinsky5_video", "t2v"), "model.vae_tiling=false").encoding == {}
    assert opened(open_tiny("cogvideox", "t2v")).encoding == {"posterior": "sample", "tiling": True}
    changed = opened(open_tiny("wan", "t2v"), "model.vae_tiling=true", "model.vae_dtype=bfloat16")
    assert changed.encoding == {"tiling": True, "dtype": "torch.bfloat16"}


@torch.no_grad()
def test_tiles_take_less_memory_and_give_nearly_the_same_latents(open_tiny: OpenTiny) -> None:
    whole = open_tiny("wan", "t2v")
    tiled = opened(whole, "model.vae_tiling=true")
    video = moving_pattern(1, 288, 288)
    expected, latents = (one.encode_clip(one.load_vae_pipeline(), video)["latents"] for one in (whole, tiled))
    assert not torch.equal(latents, expected)
    assert torch.cosine_similarity(latents.flatten(), expected.flatten(), dim=0) > 0.95
    large = Bucket(1, 768, 768)
    assert vae_peak(tiled, large) < 0.7 * vae_peak(whole, large)


@torch.no_grad()
def test_the_preparation_holds_no_decoder_and_makes_the_latents_of_the_whole_vae(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = open_tiny("wan", "t2v")
    whole = family.load_vae_pipeline()
    write_demo_clips(tmp_path / "clips", count=2)
    encode, seen = family.encode_clip, list[tuple[Any, Tensor]]()

    def watched(pipeline: Any, video: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        seen.append((pipeline.vae.decoder, video))
        return encode(pipeline, video, generator)

    monkeypatch.setattr(family, "encode_clip", watched)
    latents = prepared_latents(family, tmp_path / "clips", Cache(tmp_path / "cache"))
    assert [decoder for decoder, _ in seen] == [None, None]
    expected = [encode(whole, video)["latents"] for _, video in seen]
    # Threads encode the clips, in any order.
    assert all(any(one.equal(other) for other in expected) for one in latents)
    assert not expected[0].equal(expected[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_vae_keeps_its_dtype_in_validation(dtype: str, open_tiny: OpenTiny) -> None:
    """Under the autocast of a run in bfloat16 it decodes what it decodes alone."""
    family = opened(open_tiny("ltxvideo", "t2v"), f"model.vae_dtype={dtype}")
    pipeline: Any = family.load_sampling_pipeline(family.load_transformer(torch.bfloat16))
    alone: Any = family.load_vae_pipeline().vae
    assert pipeline.vae.dtype == alone.dtype == getattr(torch, dtype)
    latents = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = pipeline.vae.decode(latents, None, return_dict=False)[0]
    torch.testing.assert_close(decoded, alone.decode(latents.to(alone.dtype)).sample, rtol=0, atol=0)
