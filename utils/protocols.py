"""The protocols that papers on transparent objects score by, each as its authors compute it.

A protocol scores one picture into a record of counts and means, and turns the records of a data set, in any order and from any
number of processes, into its figures. `per_image` is the published run's own (utils/metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
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
    and recall are those of `precision_recall`.

    Args:
        soft: (H, W), uint8, 255 is certain.
        truth: (H, W), bool.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(soft, truth)
    levels = histogram(soft, truth)
    positives, total = float(truth.sum()), float(truth.size)
    half = 128  # the smallest value that is at least one half
    true_positives, claimed = levels[:, half:].sum(axis=1).astype(np.float64)
    precision, recall = precision_recall(levels)
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
        precision=precision,
        recall=recall,
    )


def histogram(soft: NDArray[np.uint8], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns how many pixels of glass, and how many at all, have each grey level, (2, 256).

    Args:
        soft: (H, W), uint8.
        truth: (H, W), bool.
    """
    return np.stack([np.bincount(part, minlength=THRESHOLDS) for part in (soft[truth], soft.ravel())])


def at_least(histograms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many pixels are at least k, for each k of 0 to 255: `histogram`, (..., 256), added up from above."""
    return histograms[..., ::-1].cumsum(axis=-1)[..., ::-1]


def precision_recall(histograms: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns precision and recall of one picture, or of each, at the thresholds 0/255 to 255/255, (..., 2, 256).

    (TP + eps) / (P + eps) over the pixels whose prediction is at least the threshold, eps 1e-4.

    Args:
        histograms: of `histogram`, (..., 2, 256).
    """
    counts = at_least(histograms).astype(np.float64)
    hits, predicted = counts[..., 0, :], counts[..., 1, :]
    positives = hits[..., :1]
    return np.stack(
        [
            (hits + F_BETA_EPSILON) / (predicted + F_BETA_EPSILON),
            (hits + F_BETA_EPSILON) / (positives + F_BETA_EPSILON),
        ],
        axis=-2,
    )


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


def confusion(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """Returns how many pixels of each true class (rows) were predicted as each class (columns), (K, K).

    Args:
        predicted: (H, W), uint8 in [0, K).
        truth: (H, W), uint8 in [0, K).
        num_classes: K.

    Raises:
        ValueError: if the shapes differ or another class occurs.
    """
    _check_shapes(predicted, truth)
    if max(predicted.max(initial=0), truth.max(initial=0)) >= num_classes:
        raise ValueError(f"labels must be 0 to {num_classes - 1}")
    cells = truth.astype(np.int64) * num_classes + predicted
    return np.bincount(cells.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)


def summarise_classes(matrices: Sequence[NDArray[np.int64]], names: Sequence[str]) -> dict[str, Any]:
    """Returns the data set's IoU of every class that occurs, their mean with and without the background, and pixel accuracy.

    Counts are summed over the data set first, as Trans2Seg does on Trans10k v2 (arXiv 2101.08461). A class that occurs neither
    in truths nor in predictions has no figure, None, and is left out of the means.

    Args:
        matrices: of `confusion`, one for each picture.
        names: of the classes, the background first.
    """
    total = np.sum(matrices, axis=0)
    hits, unions = np.diag(total), total.sum(axis=0) + total.sum(axis=1) - np.diag(total)
    scores = [float(hit / union) if union else None for hit, union in zip(hits, unions, strict=True)]
    found, glass = ([score for score in part if score is not None] for part in (scores, scores[1:]))
    return {
        "iou": dict(zip(names, scores, strict=True)),
        "miou": float(np.mean(found)) if found else None,
        "miou_without_background": float(np.mean(glass)) if glass else None,
        "accuracy": float(hits.sum() / total.sum()),
    }


def calibration(histograms: NDArray[np.int64], num_bins: int = 10) -> dict[str, Any]:
    """Compares how sure soft masks are with how often they are right (Guo et al. 2017, arXiv 1706.04599).

    Args:
        histograms: (2, 256), pixels of glass and pixels in all of each grey level, summed over pictures.
        num_bins: of equal width.

    Returns:
        `ece`, the expected calibration error: the mean over pixels of |mean certainty - share of glass| of their bin; and
        `bins`, each with `certainty`, `glass` and `share` of the pixels, those without pixels left out.
    """
    glass, pixels = histograms.astype(np.float64)
    levels = np.arange(THRESHOLDS) / (THRESHOLDS - 1)
    owners = np.minimum((levels * num_bins).astype(int), num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = owners == number
        count = pixels[inside].sum()
        if count:
            bins.append(
                {
                    "certainty": float((levels * pixels)[inside].sum() / count),
                    "glass": float(glass[inside].sum() / count),
                    "share": float(count / pixels.sum()),
                }
            )
    return {"ece": sum(each["share"] * abs(each["certainty"] - each["glass"]) for each in bins), "bins": bins}


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
    pixels = mask.astype(np.uint8)
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    return mask & (cv2.erode(pixels, square, borderType=cv2.BORDER_CONSTANT, borderValue=0) == 0)


def _check_shapes(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"shapes differ or are not (H, W): {first.shape} and {second.shape}")
