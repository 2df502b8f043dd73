"""The protocols that papers on transparent objects score by, each as its authors compute it.

A protocol scores one picture into a record of counts and means, and turns the records of a data set, in any order and from any
number of processes, into its figures. `per_image` is the published run's own (utils/metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

THRESHOLDS = 256
F_BETA_SQUARED = 0.3
F_BETA_EPSILON = 1e-4
BOUNDARY_SHARE = 0.02
THINGS, STUFF = 1, 2
TRANSLAB_SIDE = 512


@dataclass(frozen=True)
class GlassRecord:
    """One picture under the binary-glass protocol; precision and recall are (256,), at the thresholds 0/255 to 255/255."""

    iou: float
    mae: float
    ber: float
    accuracy: float
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]


def score_glass(soft: NDArray[np.uint8], truth: NDArray[np.bool_]) -> GlassRecord:
    """Scores a soft mask as GDNet, GhostingNet and GlassWizard do: transparent where the prediction is at least one half.

    IoU of two empty masks is 1. BER = 100 (1 - (TPR + TNR) / 2), where a class that the truth lacks counts as rate 1. Precision
    and recall at each threshold t are (TP + eps) / (P + eps) over the pixels whose prediction is at least t.

    Args:
        soft: (H, W), uint8, 255 is certain.
        truth: (H, W), bool.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(soft, truth)
    hits, predicted = (counts.astype(np.float64) for counts in threshold_counts(soft, truth))
    positives, total = float(truth.sum()), float(truth.size)
    half = 128  # the smallest value that is at least one half
    true_positives, claimed = hits[half], predicted[half]
    union = claimed + positives - true_positives
    true_negatives = total - union
    negatives = total - positives
    sensitivity = true_positives / positives if positives else 1.0
    specificity = true_negatives / negatives if negatives else 1.0
    return GlassRecord(
        iou=true_positives / union if union else 1.0,
        mae=float(np.abs(soft.astype(np.int64) - truth * np.int64(255)).sum()) / (255 * total),
        ber=100 * (1 - (sensitivity + specificity) / 2),
        accuracy=(true_positives + true_negatives) / total,
        precision=(hits + F_BETA_EPSILON) / (predicted + F_BETA_EPSILON),
        recall=(hits + F_BETA_EPSILON) / (positives + F_BETA_EPSILON),
    )


def threshold_counts(soft: NDArray[np.uint8], truth: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns how many pixels of glass, and how many at all, are at least k, for each k of 0 to 255; both (256,).

    Args:
        soft: (H, W), uint8.
        truth: (H, W), bool.
    """
    glass, pixels = np.bincount(soft[truth], minlength=THRESHOLDS), np.bincount(soft.ravel(), minlength=THRESHOLDS)
    return glass[::-1].cumsum()[::-1], pixels[::-1].cumsum()[::-1]


def summarise_glass(records: Sequence[GlassRecord]) -> dict[str, float]:
    """Returns the means over pictures, and F-beta: the maximum over thresholds at the mean precision and recall, beta^2 = .3."""
    precision, recall = (
        np.mean([getattr(record, name) for record in records], axis=0) for name in ("precision", "recall")
    )
    f_beta = (1 + F_BETA_SQUARED) * precision * recall / (F_BETA_SQUARED * precision + recall)
    means = {
        name: float(np.mean([getattr(record, name) for record in records]))
        for name in ("iou", "mae", "ber", "accuracy")
    }
    return {**means, "f_beta": float(f_beta.max())}


@dataclass(frozen=True)
class TransLabRecord:
    """One picture under TransLab's protocol, things before stuff where there are two numbers."""

    intersections: tuple[int, int]
    unions: tuple[int, int]
    correct: int
    labelled: int
    mae: float
    ber: tuple[float | None, float | None]
    """None for a class that the truth lacks."""


def score_translab(predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> TransLabRecord:
    """Scores a label map of 0 background, 1 things, 2 stuff as TransLab does (arXiv 2003.13948), at 512 x 512 by its protocol.

    In the BER of a class, TN counts the pixels outside of it whose own class is right; a picture full of the class has rate 1.

    Args:
        predicted: (H, W), uint8 in {0, 1, 2}.
        truth: (H, W), uint8 in {0, 1, 2}.

    Raises:
        ValueError: if the shapes differ or another class occurs.
    """
    _check_shapes(predicted, truth)
    if max(predicted.max(initial=0), truth.max(initial=0)) > STUFF:
        raise ValueError("labels must be 0 (background), 1 (things) or 2 (stuff)")
    right = predicted == truth
    intersections, unions, rates = [], [], []
    for label in (THINGS, STUFF):
        inside = truth == label
        hits, positives = int((right & inside).sum()), int(inside.sum())
        intersections.append(hits)
        unions.append(int((predicted == label).sum()) + positives - hits)
        outside = truth.size - positives
        specificity = int((right & ~inside).sum()) / outside if outside else 1.0
        rates.append(100 * (1 - (hits / positives + specificity) / 2) if positives else None)
    foreground = truth > 0
    return TransLabRecord(
        intersections=(intersections[0], intersections[1]),
        unions=(unions[0], unions[1]),
        correct=int((right & foreground).sum()),
        labelled=int(foreground.sum()),
        mae=float(np.abs(predicted.astype(np.int64) - truth).mean()),
        ber=(rates[0], rates[1]),
    )


def summarise_translab(records: Sequence[TransLabRecord]) -> dict[str, float | None]:
    """Returns mIoU of things and stuff summed over the data set, accuracy on glass, MAE over pictures, and mBER.

    A figure that the data set cannot give, because a class does not occur, is None.
    """
    summary: dict[str, float | None] = {}
    for index, name in enumerate(("things", "stuff")):
        union = sum(record.unions[index] for record in records)
        hits = sum(record.intersections[index] for record in records)
        summary[f"iou_{name}"] = hits / union if union else None
        rates = [rate for record in records if (rate := record.ber[index]) is not None]
        summary[f"ber_{name}"] = float(np.mean(rates)) if rates else None
    for mean, part in (("miou", "iou"), ("mber", "ber")):
        things, stuff = summary[f"{part}_things"], summary[f"{part}_stuff"]
        summary[mean] = None if things is None or stuff is None else (things + stuff) / 2
    labelled = sum(record.labelled for record in records)
    summary["accuracy"] = sum(record.correct for record in records) / labelled if labelled else None
    summary["mae"] = float(np.mean([record.mae for record in records]))
    return summary


def boundary_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_], share: float = BOUNDARY_SHARE) -> float:
    """Returns the IoU of the two masks' inner borders (Cheng et al. 2021, arXiv 2103.16562).

    A border is what erosion by d pixels takes away, d being `share` of the picture's diagonal, at least 1; what lies outside of
    the picture counts as background, so that a mask has a border along the picture's edge too. Two empty masks score 1.

    Args:
        mask: (H, W).
        truth: (H, W).
        share: of the diagonal.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(mask, truth)
    width = max(1, round(share * float(np.hypot(*truth.shape))))
    borders = [_border(values, width) for values in (mask, truth)]
    union = int((borders[0] | borders[1]).sum())
    return int((borders[0] & borders[1]).sum()) / union if union else 1.0


def _border(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    background = torch.from_numpy(~mask)[None, None].float()
    padded = F.pad(background, (width,) * 4, value=1.0)
    near = padded
    for axis in (2, 3):  # a square is a row of a column
        kernel = (2 * width + 1, 1) if axis == 2 else (1, 2 * width + 1)
        near = F.max_pool2d(near, kernel, stride=1)
    return mask & (near[0, 0].numpy() > 0)


def _check_shapes(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"shapes differ or are not (H, W): {first.shape} and {second.shape}")
