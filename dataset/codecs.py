"""What a label means: mask files <-> labels <-> pixels. Knows nothing of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

LabelReader = Callable[[Image.Image], NDArray[np.uint8]]


class Codec(Protocol):
    """The seam between a task's labels and the three-channel pictures that the VAE knows."""

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Turns labels (B, H, W) into pixels (B, 3, H, W) in [-1, 1]."""

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W) in [-1, 1] into soft labels (B, H, W) in [0, 1]."""

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns decoded pixels (B, 3, H, W), not clamped, into logits of label 1 (B, H, W), with their gradient."""

    def quantise(self, soft: torch.Tensor, threshold: float) -> torch.Tensor:
        """Turns soft labels (B, H, W) into labels (B, H, W), uint8."""


class BinaryCodec:
    """Transparent or not: label 1 is white, label 0 is black."""

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Turns labels in {0, 1}, or soft labels between, (B, H, W), into float32 pixels in [-1, 1], (B, 3, H, W)."""
        return (label.float() * 2 - 1).unsqueeze(1).expand(-1, 3, -1, -1)

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W), clamped to [-1, 1], into the mean over their channels in [0, 1], (B, H, W)."""
        return (pixels.float().clamp(-1, 1).mean(dim=1) + 1) / 2

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turns pixels (B, 3, H, W) into four times their channels' mean: white means .982, black .018."""
        return 4 * pixels.float().mean(dim=1)

    def quantise(self, soft: torch.Tensor, threshold: float) -> torch.Tensor:
        """Turns soft labels in [0, 1] into labels in {0, 1}, uint8: 1 where soft > threshold."""
        return (soft > threshold).to(torch.uint8)


CODECS: dict[str, type[BinaryCodec]] = {"binary": BinaryCodec}


def build_codec(name: str) -> Codec:
    """Returns the codec of that name.

    Raises:
        ValueError: naming the valid choices.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; valid: {', '.join(CODECS)}")
    return CODECS[name]()


def read_trans10k_label(mask: Image.Image) -> NDArray[np.uint8]:
    """Reads a Trans10k v1 mask: the mean over channels is 0 (background), 85 (things) or 255 (stuff).

    Returns:
        Label (H, W), uint8 in {0, 1}; things and stuff are both transparent.

    Raises:
        ValueError: if another value occurs.
    """
    channels: NDArray[np.integer]
    if mask.mode.startswith("I"):  # 16 bits, which the conversion to RGB would clip
        channels = np.stack([np.asarray(mask, dtype=np.int64)] * 3, axis=2)
    else:
        channels = np.asarray(mask.convert("RGB"), dtype=np.uint16)
    sums = channels.sum(axis=2, dtype=channels.dtype)
    transparent = (sums == 3 * 85) | (sums == 3 * 255)
    odd = ~transparent & (sums != 0)
    if odd.any():
        row, column = (int(value) for value in np.argwhere(odd)[0])
        raise ValueError(
            f"has {int(odd.sum())} pixels whose channel mean is none of 0, 85, 255; the first, at row {row}, column "
            f"{column}, is RGB {tuple(int(value) for value in channels[row, column])}. If any non-zero colour means "
            "transparent, use dataset_name: folder"
        )
    return transparent.astype(np.uint8)


def read_nonzero_label(mask: Image.Image) -> NDArray[np.uint8]:
    """Reads a mask in which any non-zero colour, after palette conversion, is transparent; alpha is ignored.

    Returns:
        Label (H, W), uint8 in {0, 1}.
    """
    if mask.mode in ("P", "PA", "RGBA", "LA", "La", "RGBa", "CMYK", "YCbCr"):
        mask = mask.convert("RGB")
    values = np.asarray(mask) != 0
    return (values.any(axis=2) if values.ndim == 3 else values).astype(np.uint8)
