"""Masks whose values are not what training expects: what is odd, and the mask that was meant, where that is certain."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.trans10k import Layout

TRANS10K_GREYS = (0, 85, 255)  # background, things, stuff, see read_trans10k_classes
TOLERANCE = 24.0  # levels by which JPEG moves a flat area; half the way between the nearest two legal greys is 42
MAX_CODES = 16  # a mask of no more values than this is a coding of classes and not noise
MIN_CODE_SHARE = 0.01
MAX_UNCLEAR_SHARE = 0.1  # of all pixels; edges of a compressed mask
MAX_UNCLEAR_AREA_SHARE = 0.002  # of pixels in even areas
OPAQUE = 128


class UnclearMaskError(Exception):
    """Nobody can say which mask was meant; the message tells why."""


def legal_colours(dataset_name: str, layout: Layout) -> NDArray[np.float32] | None:
    """Returns the colours that a layout's mask files may hold, (K, C) with C of 1 for greys or 3, the background first.

    None where any value is legal (a `folder` without palette) or neighbouring values are different classes (ids).
    """
    if dataset_name.startswith("trans10k") and layout.masks_folder == "masks":
        return np.array(TRANS10K_GREYS, np.float32)[:, None]
    return np.array(layout.palette.colours, np.float32) if dataset_name == "folder" and layout.palette else None


def soft_edges(mask: Image.Image) -> int:
    """Returns how many grey levels of a mask occur nowhere as an even area: those of blurred edges and of compression.

    0 for no more than `MAX_CODES` levels, as masks of colours or of numbered objects have.
    """
    levels = _levels(mask)
    if np.count_nonzero(np.bincount(levels.ravel(), minlength=256)) <= MAX_CODES:
        return 0
    even = _even(levels)
    odd = np.setdiff1d(np.unique(levels), np.unique(levels[even]))
    return len(odd) if len(odd) > MAX_CODES else 0


def hidden_alpha(mask: Image.Image, label: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Returns the opaque pixels (H, W) of a mask whose alpha channel says something else than its colours, which training reads.

    Args:
        mask: of any mode.
        label: what training reads, (H, W), uint8.
    """
    if mask.mode not in ("RGBA", "LA"):
        return None
    opaque = np.asarray(mask.getchannel("A")) >= OPAQUE
    return None if opaque.all() or not opaque.any() or (opaque == (label > 0)).all() else opaque


def snapped(mask: Image.Image, dataset_name: str, layout: Layout) -> Image.Image:
    """Returns the mask with every pixel at a legal value, where its odd values are noise around legal ones.

    A pixel takes the nearest legal value, but one that lies where two other classes meet does not become a third whose value lies
    between theirs: the blurred edge between 0 and 255 is no rim of 85.

    Raises:
        UnclearMaskError: if a value could mean two things, or too many pixels lie between legal values.
    """
    legal = legal_colours(dataset_name, layout)
    if dataset_name == "folder" and legal is None:
        levels = _levels(mask)
        counts = np.bincount(levels.ravel(), minlength=256)
        peak = int(np.flatnonzero(counts >= max(1, levels.size // 1000))[-1])
        chosen = _nearest(levels[..., None].astype(np.float32), np.array([[0], [peak]], np.float32))
        return Image.fromarray((chosen * 255).astype(np.uint8))
    if legal is None:
        raise UnclearMaskError("its values are numbers of classes, of which a neighbour is as good as another")
    if legal.shape[1] == 1:
        values = _rgb(mask).mean(axis=2, keepdims=True)
        return Image.fromarray(np.repeat(legal[_nearest(values, legal)].astype(np.uint8), 3, axis=2))
    return Image.fromarray(legal[_nearest(_rgb(mask), legal)].astype(np.uint8))


def _nearest(values: NDArray[np.float32], legal: NDArray[np.float32]) -> NDArray[np.intp]:
    """Returns the number of the legal colour (K, C) that each pixel of (H, W, C) was meant to have."""
    distances = np.stack([np.sqrt(((values - colour) ** 2).mean(axis=2)) for colour in legal])  # (K, H, W)
    nearest = distances.argmin(axis=0)
    unclear = distances.min(axis=0) > TOLERANCE
    _refuse_codes(values, nearest)
    if unclear.mean() > MAX_UNCLEAR_SHARE:
        raise UnclearMaskError(f"{unclear.mean():.0%} of its pixels lie between the legal values")
    even_unclear = float((unclear & _even(values)).mean())
    if even_unclear > MAX_UNCLEAR_AREA_SHARE:
        raise UnclearMaskError(f"{even_unclear:.1%} of its pixels are areas of values between the legal ones")
    around = [
        cv2.dilate((nearest == number).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0 for number in range(len(legal))
    ]
    for number, one, other in _between(legal):
        distances[number][around[one] & around[other]] += 1000
    return distances.argmin(axis=0)


def _between(legal: NDArray[np.float32]) -> list[tuple[int, int, int]]:
    """Returns the classes whose colour a blurred edge between two others passes by, with these two."""
    found = []
    for one, other in itertools.combinations(range(len(legal)), 2):
        way = legal[other] - legal[one]
        for number in set(range(len(legal))) - {one, other}:
            share = np.clip((legal[number] - legal[one]) @ way / (way @ way), 0, 1)
            if np.sqrt(((legal[number] - legal[one] - share * way) ** 2).mean()) < 2 * TOLERANCE:
                found.append((number, one, other))
    return found


def _refuse_codes(values: NDArray[np.float32], nearest: NDArray[np.intp]) -> None:
    """Raises UnclearMaskError for few values of which two, each of some size, would become one class: 0 and 1, say."""
    packed = np.rint(values).astype(np.int64) @ (256 ** np.arange(values.shape[2]))
    codes, first = np.unique(packed, return_index=True)
    areas = np.bincount(np.searchsorted(codes, packed[_even(values)]), minlength=len(codes))
    large = areas >= MIN_CODE_SHARE * packed.size
    meanings = nearest.ravel()[first[large]]
    if len(codes) <= MAX_CODES and len(np.unique(meanings)) < len(meanings):
        shown = ", ".join(str(round(float(value))) for value in np.unique(values.max(axis=2).ravel()[first])[:6])
        raise UnclearMaskError(f"its values ({shown}) look like another coding of classes")


def _even(values: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns the pixels (H, W) that equal all their eight neighbours."""
    kernel = np.ones((3, 3), np.uint8)
    same = np.equal(cv2.erode(values, kernel), cv2.dilate(values, kernel)).reshape(*values.shape[:2], -1)
    return np.asarray(same.all(axis=2))


def _rgb(mask: Image.Image) -> NDArray[np.float32]:
    """Returns a mask's colours (H, W, 3) from 0 to 255; 16 bits are scaled, alpha is ignored."""
    if mask.mode.startswith("I"):
        return np.repeat(np.asarray(mask, np.float32)[..., None] / 257, 3, axis=2)
    return np.asarray(mask.convert("RGB"), np.float32)


def _levels(mask: Image.Image) -> NDArray[np.uint8]:
    """Returns the strongest channel of each pixel, (H, W)."""
    if mask.mode == "L":
        return np.asarray(mask)
    return np.rint(_rgb(mask).max(axis=2)).clip(0, 255).astype(np.uint8)
