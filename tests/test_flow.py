"""Rectified flow against closed forms: sigmas, noising, weights and the inference grid."""

from __future__ import annotations

import math

import pytest
import torch

from models import flow

SHIFT = 3.0


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shifted(u: torch.Tensor, shift: float = SHIFT) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


def test_the_median_training_sigma_is_three_quarters_so_the_shift_is_applied_once() -> None:
    sigmas = flow.sample_sigmas("logit_normal", SHIFT, generators(*range(4000)))
    assert sigmas.median().item() == pytest.approx(0.75, abs=0.015)  # twice: .90, never: .50


def test_a_positive_logit_mean_means_more_noise() -> None:
    sigmas = flow.sample_sigmas("logit_normal", SHIFT, generators(*range(4000)), logit_mean=1.0)
    assert sigmas.median().item() == pytest.approx(1 / (1 + math.exp(-1) / SHIFT), abs=0.015)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_training_sigmas_follow_the_closed_form_of_their_scheme(scheme: str) -> None:
    mean, std, mode_scale = 0.4, 0.7, 1.1
    drawn = flow.sample_sigmas(scheme, SHIFT, generators(5), mean, std, mode_scale)
    (generator,) = generators(5)
    if scheme == "logit_normal":
        u = torch.sigmoid(mean + std * torch.randn(1, generator=generator))
    else:
        u = torch.rand(1, generator=generator)
        if scheme == "mode":
            u = 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(drawn, shifted(u).view(1, 1, 1, 1))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_a_sample_draws_the_same_sigma_whatever_its_batch(scheme: str) -> None:
    together = flow.sample_sigmas(scheme, SHIFT, generators(7, 8, 9))
    alone = flow.sample_sigmas(scheme, SHIFT, generators(8))
    assert together.shape == (3, 1, 1, 1)
    assert together.dtype == torch.float32
    assert torch.equal(together[1:2], alone)
    assert 0 <= together.min() <= together.max() <= 1
    assert len(together.unique()) == 3


def test_the_shift_leaves_the_ends_and_is_the_identity_at_one() -> None:
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(flow.shift_sigmas(sigmas, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert torch.equal(flow.shift_sigmas(sigmas, 1.0), sigmas)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("none", lambda s: 1.0),
        ("logit_normal", lambda s: 1.0),
        ("mode", lambda s: 1.0),
        ("sigma_sqrt", lambda s: s**-2),
        ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
    ],
)
def test_loss_weights_follow_the_closed_form_of_their_scheme(scheme: str, expected: object) -> None:
    sigmas = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1, 1)
    weights = flow.loss_weights(scheme, sigmas)
    assert weights.shape == sigmas.shape
    assert weights.flatten().tolist() == pytest.approx([expected(s) for s in (0.1, 0.5, 0.9)], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_the_inference_grid_runs_from_exactly_one_to_exactly_zero(steps: int) -> None:
    grid = flow.inference_sigmas(steps, SHIFT)
    assert grid.shape == (steps + 1,)
    assert grid[0].item() == 1.0
    assert grid[-1].item() == 0.0
    assert (grid.diff() < 0).all()


def test_the_inference_grid_is_uniform_before_its_one_shift() -> None:
    torch.testing.assert_close(flow.inference_sigmas(4, SHIFT), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_without_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
        flow.inference_sigmas(steps, SHIFT)


def test_noise_and_its_velocity_lead_back_to_the_clean_latents() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigmas = torch.tensor([0.1, 0.6, 1.0]).view(-1, 1, 1, 1)
    noisy, velocity = flow.add_noise(clean, noise, sigmas), flow.velocity(clean, noise)
    torch.testing.assert_close(flow.clean_from_velocity(noisy, velocity, sigmas), clean)
    torch.testing.assert_close(flow.euler_step(noisy, velocity, sigmas, torch.zeros_like(sigmas)), clean)
    torch.testing.assert_close(flow.euler_step(noisy, velocity, sigmas, torch.ones_like(sigmas)), noise)


def test_sigma_one_is_noise_and_sigma_zero_is_data() -> None:
    clean, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 6.0)
    values = [flow.add_noise(clean, noise, torch.full((1, 1, 1, 1), sigma)).item() for sigma in (0.0, 0.25, 1.0)]
    assert values == [2.0, 3.0, 6.0]
    assert flow.velocity(clean, noise).item() == 4.0


def test_timesteps_are_a_thousand_sigmas_in_one_row() -> None:
    sigmas = torch.tensor([0.0, 0.25, 1.0]).view(-1, 1, 1, 1)
    assert flow.timesteps_from_sigmas(sigmas).tolist() == [0.0, 250.0, 1000.0]
