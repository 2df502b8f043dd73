"""What a prediction looks like to a person, and what other tools take of it: overlays, cut-outs, contours as COCO has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dataset.codecs import Palette

COLOUR = (255, 0, 128)  # a pink that neither glass nor what is seen through it often has


def overlay(
    picture: NDArray[np.uint8], classes: NDArray[np.uint8], palette: Palette | None = None, opacity: float = 0.5
) -> NDArray[np.uint8]:
    """Tints what is transparent, and draws its outline.

    Args:
        picture: RGB (H, W, 3), uint8.
        classes: (H, W), uint8, 0 outside of the mask.
        palette: whose colours the classes have; None: one colour for all.
        opacity: of the tint, in [0, 1].

    Returns:
        RGB (H, W, 3), uint8.
    """
    colours = np.broadcast_to(np.array(COLOUR, np.uint8), picture.shape) if palette is None else palette.paint(classes)
    mask = classes > 0
    painted = picture.copy()
    tinted = cv2.addWeighted(picture, 1 - opacity, np.ascontiguousarray(colours), opacity, 0)
    painted[mask] = tinted[mask]
    width = max(1, round(max(picture.shape[:2]) / 500))
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=width, borderValue=1)
    outline = mask & (inner == 0)
    painted[outline] = colours[outline]
    return painted


def cut_out(picture: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a picture (H, W, 3), uint8, with its mask (H, W) in {0, 1} as alpha: RGBA (H, W, 4), uint8."""
    return np.dstack([picture, mask * np.uint8(255)])


def contours(classes: NDArray[np.uint8], soft: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Returns COCO's annotations of a prediction, one for each connected area of a class, without ids.

    An area without holes is a polygon through the centres of its outermost pixels, so that filling it (`cv2.fillPoly`) gives the
    area back; one with holes, which polygons cannot tell, or of fewer than three points is a run-length code.

    Args:
        classes: (H, W), uint8, 0 outside.
        soft: (H, W), float32 in [0, 1].

    Returns:
        `category_id`, `segmentation`, `bbox` (x, y, width, height), `area` in pixels, `iscrowd` (always 0) and `score`, the mean
        of `soft` inside.
    """
    found = []
    for category in np.unique(classes[classes > 0]).tolist():
        count, areas, stats, _ = cv2.connectedComponentsWithStats(
            (classes == category).astype(np.uint8), connectivity=8
        )
        for number in range(1, count):
            left, top, width, height, pixels = (int(value) for value in stats[number])
            inside = areas[top : top + height, left : left + width] == number
            lines, _ = cv2.findContours(
                inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
            )
            whole = len(lines) == 1 and len(lines[0]) >= 3
            found.append(
                {
                    "category_id": category,
                    "segmentation": [lines[0].reshape(-1).tolist()]
                    if whole
                    else run_lengths(inside, classes.shape, top, left),
                    "bbox": [left, top, width, height],
                    "area": pixels,
                    "iscrowd": 0,
                    "score": round(float(soft[top : top + height, left : left + width][inside].mean()), 4),
                }
            )
    return found


def run_lengths(inside: NDArray[np.bool_], shape: Sequence[int], top: int = 0, left: int = 0) -> dict[str, Any]:
    """Returns a mask as COCO's uncompressed run-length code: column by column, starting with the length outside.

    Args:
        inside: the mask's part (h, w) that is not empty.
        shape: of the whole, (H, W).
        top: row of the part in the whole.
        left: column.
    """
    height, width = shape
    columns, rows = np.nonzero(inside.T)
    places = (columns + left) * height + rows + top  # ascending
    starts = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    ends = np.append(starts[1:], len(places))
    counts, position = [], 0
    for first, end in zip(places[starts].tolist(), (places[ends - 1] + 1).tolist(), strict=True) if len(places) else ():
        counts += [first - position, end - first]
        position = end
    return {"size": [height, width], "counts": counts + [height * width - position] * (position < height * width)}


def coco(pictures: Sequence[dict[str, Any]], palette: Palette | None) -> dict[str, Any]:
    """Returns a COCO data set.

    Args:
        pictures: `file_name`, `width`, `height` and `contours`, as `contours` gives them, of each.
        palette: of the classes; None: the one category `transparent`.
    """
    names = palette.names[1:] if palette else ("transparent",)
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, start=1):
        annotations += [{"id": 0, "image_id": number, **each} for each in picture["contours"]]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {
        "images": [
            {"id": number, **{key: picture[key] for key in ("file_name", "width", "height")}}
            for number, picture in enumerate(pictures, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        "annotations": annotations,
    }
