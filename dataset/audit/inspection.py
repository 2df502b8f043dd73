"""One pair looked at in full: whether both files can be read, fit each other, and hold what training expects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.audit.duplicates import Fingerprint, fingerprint
from dataset.audit.findings import Finding
from dataset.audit.listing import ListedPair
from dataset.audit.mask_values import OPAQUE, UnclearMaskError, hidden_alpha, legal_colours, snapped, soft_edges
from dataset.audit.turns import EXIF_TURNS, NAMES, QUARTERS, SWAPS_SIDES, Turn, evidence, turned_size
from dataset.pictures import open_picture, upright_rgb
from dataset.trans10k import EXIF_ORIENTATION, Layout
from utils.errors import first_line

WORKING_SIDE = 512  # pixels; a JPEG is decoded no larger than needed for this
SMALLEST_SIDE = 8  # pixels: one cell of the latents
SUPPORT = 4.0  # a turn's least score, see `dataset.audit.turns.evidence`
CLEAR = 1.5  # by which a turn must beat the others where sizes or EXIF already say that there is one
STRONG = 3.0  # where the sizes fit and nothing else speaks for a turn
SAME_ASPECT = 0.01  # relative
SAME_MASK = 0.005  # share of pixels by which turns may differ and still be one


@dataclass(frozen=True)
class MaskRepair:
    """What makes a mask fit, in this order.

    Args:
        from_alpha: take the opaque pixels for the mask.
        snap: move odd values to legal ones.
        turn: turn or mirror it.
        size: (width, height) to resize it to, by nearest neighbour; None keeps its size.
    """

    from_alpha: bool = False
    snap: bool = False
    turn: Turn = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        steps = ["taken from its alpha channel"] if self.from_alpha else []
        steps += ["odd values moved to the nearest legal ones"] if self.snap else []
        steps += [f"turned {NAMES[self.turn]}"] if self.turn is not None else []
        steps += [f"resized to {self.size[0]}x{self.size[1]}"] if self.size else []
        return ", ".join(steps)


@dataclass(frozen=True)
class Inspection:
    """What is known of a pair.

    Args:
        pair: its paths.
        findings: in the order in which they were found.
        size: of the upright picture; None where it cannot be read.
        shares: of each class among the mask's pixels; None where it cannot be read.
        fingerprint: of the picture; None where it cannot be read.
        repair: what makes the mask fit.
        left_out: why the pair cannot go into a corrected copy; empty if it can.
    """

    pair: ListedPair
    findings: tuple[Finding, ...] = ()
    size: tuple[int, int] | None = None
    shares: tuple[float, ...] | None = None
    fingerprint: Fingerprint | None = None
    repair: MaskRepair = MaskRepair()
    left_out: str = ""


def repaired(mask: Image.Image, repair: MaskRepair, dataset_name: str, layout: Layout) -> Image.Image:
    """Returns a mask as its repair says.

    Raises:
        UnclearMaskError: if its values have more than one meaning.
    """
    if repair.from_alpha:
        mask = Image.fromarray((np.asarray(mask.getchannel("A")) >= OPAQUE).astype(np.uint8) * np.uint8(255))
    if repair.snap:
        mask = snapped(mask, dataset_name, layout)
    if repair.turn is not None:
        mask = mask.transpose(repair.turn)
    return mask if repair.size is None else mask.resize(repair.size, Image.Resampling.NEAREST)


def inspect_pair(pair: ListedPair, root: Path, dataset_name: str, layout: Layout) -> Inspection:
    """Reads a pair and returns what is known of it; never raises for what a file holds."""
    warnings.simplefilter("ignore")  # of Pillow, on large pictures and damaged EXIF
    image_name, mask_name = (path.relative_to(root).as_posix() for path in (pair.image, pair.mask))
    names = {"image": image_name, "mask": mask_name}
    findings: list[Finding] = []

    def report(kind: str, file: str, what: str, remedy: str) -> None:
        other = mask_name if file == image_name else image_name
        findings.append(Finding(kind, file, what, remedy, other, **names))

    found = Inspection(pair, left_out=pair.left_out)
    try:
        image, size, orientation = read_reduced(pair.image)
        found = replace(found, size=size, fingerprint=fingerprint(image, size))
    except Exception as error:  # a damaged file makes its decoder raise anything
        report("unreadable", image_name, _why(error), "replace the file or remove the pair")
        found = replace(found, left_out="its picture cannot be read")
    try:
        with open_picture(pair.mask) as mask:
            mask.load()
            reading = _read_mask(mask, dataset_name, layout)
    except Exception as error:
        report("unreadable", mask_name, _why(error), "replace the file or remove the pair")
        return replace(found, findings=tuple(findings), left_out="its mask cannot be read")
    if reading.trouble:
        report("values", mask_name, reading.trouble, reading.remedy)
    found = replace(found, repair=reading.repair, left_out=found.left_out or reading.left_out)
    label = reading.label
    if label is None:
        return replace(found, findings=tuple(findings))
    num_classes = len(layout.palette.names) if layout.palette else 2
    counts = np.bincount(label.ravel(), minlength=num_classes)
    found = replace(found, shares=tuple(float(count) / label.size for count in counts))
    if counts[0] == label.size:
        report("empty", mask_name, "holds nothing transparent", "make sure that there is none")
    elif counts[0] == 0:
        report("full", mask_name, "is transparent all over", "make sure that it is")
    if found.fingerprint is not None:
        if min(*size, *label.shape) < SMALLEST_SIDE:
            report("size", image_name, f"is {_by(size)}, its mask {_by(label.shape[::-1])}", "remove the pair")
            found = replace(found, left_out=f"it is smaller than {SMALLEST_SIDE} pixels")
        else:
            fit = fit_mask(image, size, label, orientation)
            if fit.kind:
                report(fit.kind, mask_name, fit.what, fit.remedy)
            repair = replace(found.repair, turn=fit.turn, size=fit.size)
            found = replace(found, repair=repair, left_out=found.left_out or fit.left_out)
    return replace(found, findings=tuple(findings))


@dataclass(frozen=True)
class _Reading:
    """A mask as training reads it, or as it was meant."""

    label: NDArray[np.uint8] | None
    repair: MaskRepair = MaskRepair()
    trouble: str = ""
    remedy: str = ""
    left_out: str = ""


def _read_mask(mask: Image.Image, dataset_name: str, layout: Layout) -> _Reading:
    """Returns the label of a decoded mask and what is odd about its values."""
    trouble, repair = "", MaskRepair()
    try:
        label = layout.read_label(mask)
        opaque = hidden_alpha(mask, label)
        if opaque is not None:
            trouble = "says something else in its alpha channel than in its colours, and training reads the colours"
            legal = legal_colours(dataset_name, layout)
            if label.min() != label.max() or layout.palette or (legal is not None and legal.shape[1] != 1):
                return _Reading(
                    label, repair, trouble, "draw the mask in colours", "its alpha and its colours disagree"
                )
            repair = MaskRepair(from_alpha=True)
        elif dataset_name == "folder" and layout.palette is None and (levels := soft_edges(mask)):
            trouble = (
                f"has {levels} grey levels on its edges, as blur or JPEG leaves them: training takes every pixel that is not "
                "black for transparent"
            )
            repair = MaskRepair(snap=True)
    except ValueError as error:
        label, trouble, repair = None, first_line(error, 400), MaskRepair(snap=True)
    if not trouble:
        return _Reading(label)
    try:
        meant = layout.read_label(repaired(mask, repair, dataset_name, layout))
    except (UnclearMaskError, ValueError) as error:
        return _Reading(label, MaskRepair(), trouble, f"draw it again ({error})", f"its mask is unclear: {error}")
    return _Reading(meant, repair, trouble, f"--fix writes it {repair}")


@dataclass(frozen=True)
class Fit:
    """How a mask fits its picture; `kind` is empty where it does."""

    kind: str = ""
    what: str = ""
    remedy: str = ""
    turn: Turn = None
    size: tuple[int, int] | None = None
    left_out: str = ""


def fit_mask(image: NDArray[np.uint8], size: tuple[int, int], label: NDArray[np.uint8], orientation: int) -> Fit:
    """Returns whether a mask fits its picture by size and edges, and what would make it fit.

    Args:
        image: upright RGB (h, w, 3), uint8, possibly decoded at a reduced size.
        size: the upright picture's width and height in its file.
        label: the mask (H, W), uint8.
        orientation: the picture's EXIF orientation, 1 to 8.
    """
    mask_size = label.shape[1], label.shape[0]
    exif_turn = EXIF_TURNS.get(orientation)
    options: list[Turn] = [*QUARTERS, *({exif_turn} - set(QUARTERS))]
    exact = [turn for turn in options if turned_size(mask_size, turn) == size]
    usable = exact or [turn for turn in options if _same_aspect(turned_size(mask_size, turn), size)]
    sizes = f"is {_by(mask_size)}, its picture {_by(size)}"
    if not usable:
        return Fit("size", sizes, "find the mask of this picture", left_out="picture and mask have different shapes")
    if label.min() == label.max():
        best, margin, scores = usable[0], np.inf, dict.fromkeys(usable, np.inf)
    else:
        scores = evidence(image, label, usable)
        best, margin = _best(scores, label)
    matched = f"edge match {scores[best]:.1f}, otherwise {scores[best] - margin:.1f}"
    if None in exact:
        # A mask that lies on edges as it is, if not on the strongest, is more likely right than turned.
        needed = CLEAR if best is not None and best == exif_turn else max(STRONG, scores[best] / 2)
        if best is None or scores[best] < SUPPORT or margin < needed:
            return Fit()
        told = ", as its picture's EXIF orientation says" if best == exif_turn else ""
        what = f"is turned against its picture: it would fit turned {NAMES[best]}{told} ({matched})"
        return Fit("rotated", what, "--fix turns it", best)
    scaled = None if exact else size
    kind = "rotated" if exact else "size"
    clear = scores[best] >= SUPPORT and margin >= CLEAR
    if exif_turn in exact and not (clear and best != exif_turn):
        what = (
            f"{sizes}: it was drawn on the picture as stored, before its EXIF orientation turns it {NAMES[exif_turn]}"
        )
        return Fit(kind, what, "--fix turns it likewise", exif_turn)
    if not clear or (exif_turn in exact and best != exif_turn):
        reason = "edges and EXIF disagree" if clear else f"edges do not tell which way ({matched})"
        turned = ", rotated by 90 degrees against each other" if best in SWAPS_SIDES else ""
        return Fit(kind, f"{sizes}{turned}; {reason}", "turn or replace it by hand", left_out=reason)
    told = "" if np.isinf(margin) else f" ({matched})"
    turned = (
        f", rotated by 90 degrees: it fits turned {NAMES[best]}{told}" if best is not None else ", of the same shape"
    )
    return Fit(kind, f"{sizes}{turned}", f"--fix {'resizes' if best is None else 'turns'} it", best, scaled)


def _best(scores: dict[Turn, float], label: NDArray[np.uint8]) -> tuple[Turn, float]:
    """Returns the turn of the highest score and by how much it beats those that make another mask of the label."""
    best = max(scores, key=lambda turn: scores[turn])
    step = max(1, max(label.shape) // WORKING_SIDE)
    label = np.ascontiguousarray(label[::step, ::step])
    shown = _turned(label, best)
    rivals = []
    for turn, score in scores.items():
        if turn != best:
            other = _turned(label, turn)
            if other.shape != shown.shape or (other != shown).mean() > SAME_MASK:
                rivals.append(score)
    return best, scores[best] - max(rivals) if rivals else float("inf")


def _turned(label: NDArray[np.uint8], turn: Turn) -> NDArray[np.uint8]:
    return label if turn is None else np.asarray(Image.fromarray(label).transpose(turn))


def _same_aspect(one: Sequence[int], other: Sequence[int]) -> bool:
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= SAME_ASPECT


def read_reduced(path: Path) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
    """Returns a picture, upright RGB (h, w, 3), its upright size in the file, and its EXIF orientation."""
    with open_picture(path) as image:
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
        size = turned_size(image.size, EXIF_TURNS.get(orientation))
        image.draft("RGB", (WORKING_SIDE, WORKING_SIDE))  # decodes a JPEG smaller, yet reads all of it
        return np.array(upright_rgb(image)), size, orientation


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no picture"
    return f"cannot be read ({first_line(error, 120)})"


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
