"""Rectified flow as in SD3 (Esser et al. 2024, arXiv 2403.03206): sigma 1 is noise, sigma 0 is data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Returns `shift * s / (1 + (shift - 1) * s)` (equation 23): the resolution-dependent shift, to be applied once."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    weighting_scheme: str,
    shift: float,
    generators: Sequence[torch.Generator],
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """Draws one training sigma per sample: u from the scheme's density (section 3.1), shifted exactly once.

    Args:
        weighting_scheme: none, logit_normal, mode, sigma_sqrt or cosmap.
        shift: of the scheduler, 3 for SD3.5.
        generators: one CPU generator per sample.
        logit_mean: of the normal before the sigmoid; positive means more noise.
        logit_std: of the normal before the sigmoid.
        mode_scale: of the mode density.

    Returns:
        Sigmas (B, 1, 1, 1), float32 in [0, 1], on the CPU.
    """
    draws = [
        compute_density_for_timestep_sampling(
            weighting_scheme, 1, logit_mean, logit_std, mode_scale, generator=generator
        )
        for generator in generators
    ]
    return shift_sigmas(torch.cat(draws), shift).view(-1, 1, 1, 1)


def loss_weights(weighting_scheme: str, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the scheme's loss weight of each sigma (section 3.1), same shape."""
    return compute_loss_weighting_for_sd3(weighting_scheme, sigmas)


def inference_sigmas(num_inference_steps: int, shift: float) -> torch.Tensor:
    """Returns the grid of an Euler integration: num_inference_steps + 1 sigmas from exactly 1 down to exactly 0.

    The grid is uniform before the shift. It does not come from the scheduler, whose own timesteps are already shifted.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1")
    return shift_sigmas(torch.linspace(1, 0, num_inference_steps + 1), shift)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns `(1 - sigma) * clean + sigma * noise` (equation 13), shapes (B, C, h, w) and (B, 1, 1, 1)."""
    return (1 - sigmas) * clean + sigmas * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Returns d noisy / d sigma = `noise - clean`, the target of the pretrained model."""
    return noise - clean


def clean_from_velocity(noisy: torch.Tensor, model_pred: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the clean estimate `noisy - sigma * velocity`."""
    return noisy - sigmas * model_pred


def euler_step(
    noisy: torch.Tensor, model_pred: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor
) -> torch.Tensor:
    """Returns the state at `next_sigma` after one Euler step along the predicted velocity."""
    return noisy + (next_sigma - sigma) * model_pred


def timesteps_from_sigmas(sigmas: torch.Tensor) -> torch.Tensor:
    """Returns `1000 * sigma`, (B,), the transformer's time input."""
    return sigmas.flatten() * NUM_TRAIN_TIMESTEPS
