"""The noise processes, held against the schedulers of diffusers and against the loss of CogVideoX's authors."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler

from crepa_cli.models.family import TransformerStep
from crepa_cli.models.noise import Flow, VPrediction
from crepa_cli.training.flow import diffusion_loss, sample_sigmas, spread_sigmas

TIMESTEPS = torch.arange(1000)
LEVELS = (TIMESTEPS + 0.5) / 1000


def scheduler_of(snr_shift_scale: float) -> CogVideoXDDIMScheduler:
    """The scheduler that is published with CogVideoX 2B (3.0) and 5B (1.0)."""
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale
    )


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1000, 2, 1, 3, 2, generator=generator) for _ in range(2))
    return first, second


def test_flow_noises_as_its_scheduler_does() -> None:
    latents, noise = latents_and_noise()
    scheduler = FlowMatchEulerDiscreteScheduler()
    expected = scheduler.scale_noise(latents, scheduler.timesteps, noise)
    torch.testing.assert_close(Flow().add_noise(latents, noise, scheduler.timesteps / 1000), expected)
    assert torch.equal(Flow().target(latents, noise, LEVELS), noise - latents)


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_v_prediction_noises_and_predicts_as_its_scheduler_does(snr_shift_scale: float) -> None:
    latents, noise = latents_and_noise()
    scheduler = scheduler_of(snr_shift_scale)
    process = VPrediction(scheduler.alphas_cumprod)
    assert torch.equal(process.timesteps(LEVELS), TIMESTEPS)
    noisy = process.add_noise(latents, noise, LEVELS)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, TIMESTEPS), rtol=1e-4, atol=1e-5)
    target = process.target(latents, noise, LEVELS)
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, TIMESTEPS), rtol=1e-4, atol=1e-5)
    assert torch.equal(noisy[-1], noise[-1]), "at the last timestep nothing is left of the latents"


def test_the_loss_is_that_of_the_latents_weighted_as_the_authors_weight_it() -> None:
    """THUDM/CogVideo: finetune/models/cogvideox_t2v/lora_trainer.py; at every timestep it is the plain error of v."""
    latents, noise = (tensor.double() for tensor in latents_and_noise())
    alphas = scheduler_of(1.0).alphas_cumprod.double()
    process = VPrediction(alphas)
    noisy, target = (method(latents, noise, LEVELS) for method in (process.add_noise, process.target))
    predicted = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    of_latents, of_noise = (share.sqrt().view(-1, 1, 1, 1, 1) for share in (alphas, 1 - alphas))
    found = of_latents * noisy - of_noise * predicted
    weighted = ((found - latents) ** 2).flatten(1).mean(1) / (1 - alphas)
    plain = [
        diffusion_loss(predicted[[index]], TransformerStep({}, target[[index]]), LEVELS[[index]], "none").item()
        for index in range(0, 1000, 37)
    ]
    torch.testing.assert_close(torch.tensor(plain), weighted[::37].float(), rtol=1e-4, atol=0)


def test_uniform_noise_levels_are_uniform_timesteps() -> None:
    process = VPrediction(scheduler_of(1.0).alphas_cumprod)
    drawn = sample_sigmas(100_000, "uniform", 1.0, torch.Generator().manual_seed(0))
    counts = process.timesteps(drawn).bincount(minlength=1000)
    assert len(counts) == 1000
    assert (counts > 50).all()
    assert (counts < 170).all()
    spread = process.timesteps(spread_sigmas(4, "uniform", 1.0)).float()
    torch.testing.assert_close(spread, torch.tensor([125.0, 375.0, 625.0, 875.0]), rtol=0, atol=15)
    assert process.timesteps(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_factors_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in every step would make the CPU wait for the GPU."""
    process = VPrediction(scheduler_of(1.0).alphas_cumprod)
    latents, levels = torch.empty(2, 4, 3, 2, 2, device="meta"), torch.empty(2, device="meta")
    process.add_noise(latents, latents, levels)
    monkeypatch.delattr(torch, "tensor")
    assert process.target(latents, latents, levels).shape == latents.shape
