"""Pictures larger than a model's size: overlapping tiles, blended without seams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

TILE_OVERLAP = 0.25  # of a tile's side, at least


def predict_tiles(
    predict: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, members: int, tile_size: int | None
) -> torch.Tensor:
    """Predicts pictures in tiles where a side is longer than one; each tile weighs less towards its edges.

    Args:
        predict: turns tiles (B, 3, h, w) into pixels (B x members, 3, h, w) on the CPU.
        images: (B, 3, H, W).
        members: predictions of each picture.
        tile_size: side of a tile in pixels; None: whole pictures.

    Returns:
        Pixels (B x members, 3, H, W).
    """
    height, width = images.shape[2:]
    rows, columns = (tile_spans(length, tile_size or length) for length in (height, width))
    if len(rows) == len(columns) == 1:
        return predict(images)
    total, weights = torch.zeros(len(images) * members, 3, height, width), torch.zeros(height, width)
    for top, bottom in rows:
        for left, right in columns:
            weight = _tent(bottom - top)[:, None] * _tent(right - left)
            total[:, :, top:bottom, left:right] += weight * predict(images[:, :, top:bottom, left:right])
            weights[top:bottom, left:right] += weight
    return total / weights


def tile_spans(length: int, tile_size: int) -> list[tuple[int, int]]:
    """Returns (start, end) of the tiles along a side: evenly spread, neighbours sharing at least `TILE_OVERLAP` of a tile."""
    if length <= tile_size:
        return [(0, length)]
    count = 1 + math.ceil((length - tile_size) / (tile_size * (1 - TILE_OVERLAP)))
    starts = [round(number * (length - tile_size) / (count - 1)) for number in range(count)]
    return [(start, start + tile_size) for start in starts]


def resized(pictures: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Returns pictures (B, C, H, W) at another size (height, width), bilinear with antialiasing."""
    if list(pictures.shape[2:]) == list(size):
        return pictures
    return F.interpolate(pictures, tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _tent(length: int) -> torch.Tensor:
    """Returns weights (length,) in (0, 1] that fall off linearly over a tile's overlap with its neighbours."""
    distance = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1)).float()
    return (distance / max(1.0, TILE_OVERLAP * length)).clamp(max=1.0)
