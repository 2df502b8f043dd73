"""Pixels <-> latents: the only place that knows the VAE's shift and scale."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

DOWNSCALE = 8


class LatentCodec:
    """Encodes pixels to normalised latents with a frozen VAE, and decodes them.

    Args:
        vae: with `scaling_factor` and `shift_factor` in its configuration.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.scaling_factor: float = vae.config.scaling_factor
        self.shift_factor: float = vae.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns `(z - shift_factor) * scaling_factor` for z the mode of the VAE's posterior, never a sample of it.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], H and W multiples of 8, any float dtype.

        Returns:
            Latents (B, C, H/8, W/8), float32.

        Raises:
            ValueError: if the shape is another.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % DOWNSCALE or pixels.shape[3] % DOWNSCALE:
            raise ValueError(
                f"expected pixels (B, 3, H, W) with H and W multiples of {DOWNSCALE}, got {tuple(pixels.shape)}"
            )
        pixels = pixels.to(self.vae.dtype, memory_format=torch.channels_last)
        mode = self.vae.encode(pixels).latent_dist.mode()
        return (mode.float().contiguous() - self.shift_factor) * self.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the decoded pixels of `latents / scaling_factor + shift_factor`; gradients flow through.

        Args:
            latents: (B, C, h, w), any float dtype.

        Returns:
            Pixels (B, 3, 8h, 8w), float32, about [-1, 1], not clamped.
        """
        z = latents.float() / self.scaling_factor + self.shift_factor
        return self.vae.decode(z.to(self.vae.dtype, memory_format=torch.channels_last)).sample.float().contiguous()
