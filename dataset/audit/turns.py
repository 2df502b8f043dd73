"""Which way a mask is turned: its boundary under each turn against the picture's edges."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.complex64]
Turn = Image.Transpose | None

SIDE = 256  # pixels of the longer side at which edges are compared
EDGE_POWER = 0.25  # of an edge's strength: faint edges of glass count nearly as much as a lamp's
SLACK_PIXELS = 2  # by which a boundary may miss its edge

QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
NAMES: dict[Turn, str] = {
    None: "not at all",
    Image.Transpose.ROTATE_90: "by 90 degrees counter-clockwise",
    Image.Transpose.ROTATE_180: "by 180 degrees",
    Image.Transpose.ROTATE_270: "by 90 degrees clockwise",
    Image.Transpose.FLIP_LEFT_RIGHT: "left to right",
    Image.Transpose.FLIP_TOP_BOTTOM: "upside down",
    Image.Transpose.TRANSPOSE: "about its diagonal",
    Image.Transpose.TRANSVERSE: "about its other diagonal",
}
SWAPS_SIDES = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)
# What Pillow does to show a picture of that EXIF orientation upright.
EXIF_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turned_size(size: tuple[int, int], turn: Turn) -> tuple[int, int]:
    """Returns (width, height) after a turn."""
    return size[::-1] if turn in SWAPS_SIDES else size


def evidence(image: NDArray[np.uint8], label: NDArray[np.uint8], turns: Sequence[Turn]) -> dict[Turn, float]:
    """Returns how well the turned mask's boundary lies on the picture's edges.

    The picture's gradient, as a complex number of twice its angle, so that dark to bright counts as bright to dark, is correlated
    with that of the mask over all shifts. The score is the correlation without a shift (the best within `SLACK_PIXELS`) in standard
    deviations of that over all shifts: around 0 for a mask that has nothing to do with the picture.

    Args:
        image: upright RGB (H, W, 3), uint8.
        label: (h, w), uint8, of any size; 0 is the background.
        turns: each must give the label the picture's aspect ratio.
    """
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    small = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    edges = np.fft.fft2(_field(small, EDGE_POWER))
    planes = [_shrunk(label == value) for value in np.flatnonzero(np.bincount(label.ravel())) if value]
    scores: dict[Turn, float] = {}
    for turn in turns:
        boundary: Field = np.zeros(shape, np.complex64)
        for plane in planes:
            turned = plane if turn is None else np.asarray(Image.fromarray(plane).transpose(turn))
            fitted = np.asarray(cv2.resize(turned, shape[::-1], interpolation=cv2.INTER_AREA), np.float32)
            boundary = boundary + _field(fitted[..., None], 0.5)
        correlation = np.fft.ifft2(edges * np.conj(np.fft.fft2(boundary))).real
        near = np.roll(correlation, (SLACK_PIXELS, SLACK_PIXELS), (0, 1))[
            : 2 * SLACK_PIXELS + 1, : 2 * SLACK_PIXELS + 1
        ]
        spread = float(correlation.std())
        scores[turn] = float(near.max() - correlation.mean()) / spread if spread > 1e-6 else 0.0
    return scores


def _shrunk(plane: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Returns a plane of 0 and 1 with the longer side no more than `SIDE`."""
    height, width = plane.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(plane.view(np.uint8) * np.uint8(255), size, interpolation=cv2.INTER_AREA), np.float32)


def _field(pixels: NDArray[np.float32], power: float) -> Field:
    """Returns the squared complex gradient (H, W) of pixels (H, W, C), summed over channels, its length to the given power."""
    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.0).reshape(pixels.shape)
    squared: NDArray[np.complexfloating] = np.zeros(pixels.shape[:2], np.complex64)
    for channel in range(pixels.shape[2]):
        plane = np.ascontiguousarray(smooth[..., channel])
        gradient = cv2.Scharr(plane, cv2.CV_32F, 1, 0) + 1j * cv2.Scharr(plane, cv2.CV_32F, 0, 1)
        squared = squared + gradient**2
    length = np.abs(squared)
    return np.asarray(squared * np.maximum(length, 1e-6) ** (power - 1), np.complex64)
