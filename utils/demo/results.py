"""A prediction that is kept to be looked at under any threshold and to be downloaded, without predicting again."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dataset.codecs import Palette
from utils.rendering import cut_out, overlay

VIEW_NAMES = ("Overlay", "Mask", "Soft", "Uncertainty", "Cut-out")
DOWNLOADS = ("mask", "soft", "overlay", "cutout")
CHECKERS = (255, 208)
CHECKER_PIXELS = 12
COLOUR_MAP = cv2.COLORMAP_MAGMA
LOWEST_SCALE = 0.05  # of the uncertainty: voters who agree to the last digits are not blown up to full colour


@dataclass(frozen=True)
class Result:
    """What was predicted for a picture.

    Args:
        name: of the file, as its owner calls it.
        picture: RGB (H, W, 3), uint8.
        soft: (H, W), float32 in [0, 1].
        uncertainty: (H, W), float32 in [0, 0.5], or None where there was one answer only.
        seconds: that the prediction took.
        classes: (H, W), uint8, the class of each pixel wherever `soft` is not 0, of a model that tells them apart.
        palette: of the classes.
    """

    name: str
    picture: NDArray[np.uint8]
    soft: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    seconds: float
    classes: NDArray[np.uint8] | None = None
    palette: Palette | None = None

    def mask(self, threshold: float) -> NDArray[np.uint8]:
        """Returns (H, W), uint8, 1 where `soft` exceeds the threshold, as the pipeline does."""
        return (self.soft > threshold).astype(np.uint8)

    @property
    def highest_uncertainty(self) -> float:
        """Where the colours of the uncertainty end."""
        return LOWEST_SCALE if self.uncertainty is None else max(LOWEST_SCALE, float(self.uncertainty.max()))

    def reduced(self, side: int) -> Result:
        """Returns the result with no side longer than `side` pixels."""
        height, width = self.soft.shape
        scale = side / max(height, width)
        if scale >= 1:
            return self
        size = (max(1, round(width * scale)), max(1, round(height * scale)))

        def shrink(values: NDArray[Any], interpolation: int = cv2.INTER_AREA) -> NDArray[Any]:
            return np.asarray(cv2.resize(values, size, interpolation=interpolation))

        uncertainty = None if self.uncertainty is None else shrink(self.uncertainty)
        classes = None if self.classes is None else shrink(self.classes, cv2.INTER_NEAREST)
        picture, soft = shrink(self.picture), shrink(self.soft)
        return replace(self, picture=picture, soft=soft, uncertainty=uncertainty, classes=classes)

    def render(self, view: str, threshold: float, opacity: float) -> NDArray[np.uint8]:
        """Returns a view, RGB (H, W, 3) or grey (H, W), uint8; the picture itself where there is no uncertainty to show.

        Args:
            view: of `VIEW_NAMES`.
            threshold: in [0, 1].
            opacity: of the overlay, in [0, 1].
        """
        if view == "Soft":
            return np.rint(self.soft * 255).astype(np.uint8)
        if view == "Uncertainty":
            return self.picture if self.uncertainty is None else in_colours(self.uncertainty, self.highest_uncertainty)
        mask = self.mask(threshold)
        if view == "Mask":
            return mask * np.uint8(255)
        if view == "Cut-out":
            return on_checkers(cut_out(self.picture, mask))
        return overlay(self.picture, mask if self.classes is None else mask * self.classes, self.palette, opacity)

    def download(self, kind: str, threshold: float, opacity: float) -> tuple[str, bytes]:
        """Returns the name and content of a PNG in the picture's own size.

        Args:
            kind: of `DOWNLOADS`: mask (0 and 255), soft (16 bits), overlay, or cutout (with alpha).
            threshold: in [0, 1].
            opacity: of the overlay, in [0, 1].
        """
        if kind == "soft":
            picture: NDArray[Any] = np.rint(self.soft * 65535).astype(np.uint16)
        elif kind == "cutout":
            picture = cut_out(self.picture, self.mask(threshold))
        else:
            picture = self.render(kind.capitalize(), threshold, opacity)
        return f"{stem_of(self.name)}_{kind}.png", encode(picture)


def in_colours(values: NDArray[np.float32], highest: float) -> NDArray[np.uint8]:
    """Returns RGB (H, W, 3), uint8: values (H, W) in [0, `highest`] from black over red to light yellow."""
    grey = np.rint(np.clip(values / highest, 0, 1) * 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(grey, COLOUR_MAP), cv2.COLOR_BGR2RGB), np.uint8)


def on_checkers(cut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns RGB (H, W, 3), uint8: a cut-out RGBA (H, W, 4), uint8, with alpha 0 or 255, upon a chequered ground."""
    rows, columns = (np.arange(length) // CHECKER_PIXELS for length in cut.shape[:2])
    ground = np.array(CHECKERS, np.uint8)[(rows[:, None] + columns) % 2]
    return np.where(cut[..., 3:] > 0, cut[..., :3], ground[..., None])


def encode(picture: NDArray[Any], ending: str = ".png") -> bytes:
    """Returns a picture's file, `.png` without loss or `.jpg`.

    Args:
        picture: (H, W), uint8 or uint16, RGB (H, W, 3) or RGBA (H, W, 4), uint8.
        ending: of the file's name.
    """
    if picture.ndim == 3:
        picture = picture[..., [2, 1, 0, 3][: picture.shape[2]]]  # OpenCV's order
    done, data = cv2.imencode(ending, picture)
    if not done:
        raise ValueError(f"a picture of shape {picture.shape} and {picture.dtype} has no {ending} file")
    return data.tobytes()


def stem_of(name: str) -> str:
    """Returns a file's name without its ending and without anything that a file system might not take."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80] or "picture"
