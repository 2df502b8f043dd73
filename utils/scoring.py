"""Scores each picture of a split at several sizes under several protocols, and adds the records up to figures.

A picture's record holds counts and means alone, so that records of several processes are put together in any number and give
the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.codecs import THINGS_STUFF, Palette
from dataset.trans10k import Layout, Pair
from dataset.transforms import read_label
from utils.compare import interval
from utils.errors import InputError
from utils.metrics import COLUMNS, DECIMALS, PictureScore, score_picture, summarise
from utils.protocols import (
    GlassRecord,
    TransLabRecord,
    confusion,
    score_glass,
    score_translab,
    summarise_classes,
    summarise_glass,
    summarise_translab,
)

PROTOCOLS = ("per_image", "glass", "translab", "classes")
TRAINING, OWN = "training", "own"
# Where each protocol's own papers score; at another size a figure stands beside theirs with that difference.
PUBLISHED_SIZES = {"per_image": TRAINING, "glass": OWN, "translab": "512"}
MIN_SIDE, MAX_SIDE = 16, 16384


@dataclass(frozen=True)
class Record:
    """What one picture scored at one size, by each protocol that was asked for."""

    per_image: PictureScore | None
    glass: GlassRecord | None
    translab: TransLabRecord | None
    classes: NDArray[np.int64] | None


class Scorer:
    """Scores pictures at sizes under protocols.

    Args:
        protocols: names with commas, of `PROTOCOLS`.
        sizes: with commas: `training`, `own` or a side in pixels.
        layout: of the data set.
        threshold: that quantises, in [0, 1].

    Raises:
        InputError: for an unknown name, a side out of range, or a protocol that needs classes the data set does not tell.
    """

    def __init__(self, protocols: str, sizes: str, layout: Layout, threshold: float) -> None:
        self.layout, self.threshold = layout, threshold
        self.protocols = _names(protocols)
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise InputError(f"protocol: {name!r} is none; there are: {', '.join(PROTOCOLS)}")
        self.sizes = _names(sizes)
        for size in self.sizes:
            if size not in (TRAINING, OWN) and not (size.isdecimal() and MIN_SIDE <= int(size) <= MAX_SIDE):
                raise InputError(
                    f"score_sizes: {size!r} is not valid, expected {TRAINING}, {OWN} or a side of {MIN_SIDE} to {MAX_SIDE} pixels"
                )
        if not self.protocols or not self.sizes:
            raise InputError("protocol and score_sizes must each name at least one")
        palette = layout.palette
        if "translab" in self.protocols and (palette is None or palette.names != THINGS_STUFF.names):
            raise InputError(
                "protocol: translab tells things from stuff; train and score with dataset_name: trans10k_classes, or leave it out"
            )
        if "classes" in self.protocols and palette is None:
            raise InputError(
                "protocol: classes needs a data set that tells classes (trans10k_classes, trans10k_v2, a folder with a palette); leave it out"
            )

    def score(
        self,
        pair: Pair,
        raw: NDArray[np.uint8],
        soft: NDArray[np.uint8],
        classes: NDArray[np.uint8],
        truth: NDArray[np.uint8],
    ) -> dict[str, Record]:
        """Scores one picture.

        Args:
            pair: whose mask is read for the sizes beside the training's.
            raw: prediction (H, W, 3), uint8, whose error the per-image protocol measures.
            soft: how sure each pixel is glass (H, W), uint8.
            classes: predicted (H, W), uint8, 0 outside of the mask.
            truth: label (H, W), uint8, at the training's size.

        Returns:
            A record for each size.
        """
        own = None
        records = {}
        for size in self.sizes:
            if size == TRAINING:
                parts = (raw, soft, classes, truth)
            else:
                own = read_label(pair.mask_path, self.layout.read_label) if own is None else own
                height, width = own.shape if size == OWN else (int(size), int(size))
                nearest, bilinear = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
                resized = _resized(soft, (width, height), bilinear)
                labels = _resized(classes, (width, height), nearest)
                parts = (
                    _resized(raw, (width, height), bilinear),
                    resized,
                    labels,
                    _resized(own, (width, height), nearest),
                )
            records[size] = self._record(pair, *parts, quantised=size == TRAINING)
        return records

    def _record(
        self,
        pair: Pair,
        raw: NDArray[np.uint8],
        soft: NDArray[np.uint8],
        classes: NDArray[np.uint8],
        truth: NDArray[np.uint8],
        quantised: bool,
    ) -> Record:
        glass = truth > 0
        mask = classes > 0 if quantised else soft > 255 * self.threshold
        return Record(
            per_image=score_picture(raw, mask, glass, pair.name, pair.difficulty)
            if "per_image" in self.protocols
            else None,
            glass=score_glass(soft, glass) if "glass" in self.protocols else None,
            translab=score_translab(classes, truth) if "translab" in self.protocols else None,
            classes=confusion(classes, truth, len(self.layout.palette.names))
            if "classes" in self.protocols and self.layout.palette
            else None,
        )

    def summarise(self, records: Sequence[dict[str, Record]]) -> dict[str, dict[str, Any]]:
        """Returns the figures of a data set by protocol, then by size.

        Args:
            records: of `score`, one for each picture.
        """
        figures: dict[str, dict[str, Any]] = {name: {} for name in self.protocols}
        for size in self.sizes:
            parts = {name: [getattr(record[size], name) for record in records] for name in self.protocols}
            for name, group in parts.items():
                figures[name][size] = self._figures(name, group)
        return figures

    def _figures(self, protocol: str, group: Sequence[Any]) -> dict[str, Any]:
        if protocol == "per_image":
            return {**summarise(group), "intervals": intervals(group)}
        if protocol == "glass":
            return dict(summarise_glass(group))
        if protocol == "translab":
            return dict(summarise_translab(group))
        palette: Palette | None = self.layout.palette
        assert palette is not None
        return summarise_classes(group, palette.names)


def intervals(scores: Sequence[PictureScore]) -> dict[str, list[float]]:
    """Returns the 95 % bootstrap interval over pictures of each column's mean."""
    return {
        column: [round(end, DECIMALS) for end in interval(np.array([[getattr(score, column) for score in scores]]))]
        for column in COLUMNS
    }


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _resized(values: NDArray[np.uint8], size: tuple[int, int], how: Image.Resampling) -> NDArray[np.uint8]:
    return values if values.shape[1::-1] == size else np.array(Image.fromarray(values).resize(size, how))
