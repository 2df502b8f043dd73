"""Scores under the per-image protocol, from arrays or from folders of PNGs, and folders under other papers' protocols.

`python -m utils.metrics FOLDER` scores `NAME_maskq.png`, `NAME_pred.png` and `NAME_maskgt.png` and prints JSON.
`python -m utils.metrics PREDICTIONS TRUTHS --protocol per_image glass translab` scores anybody's masks against true ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.pictures import open_picture
from utils.errors import InputError, first_line, run_command
from utils.protocols import (
    STUFF,
    THINGS,
    TRANSLAB_SIDE,
    GlassRecord,
    TransLabRecord,
    at_least,
    boundary_iou,
    score_glass,
    score_translab,
    summarise_glass,
    summarise_translab,
)

PROTOCOL = (
    "per_image: binary, at the resolution of the masks; IoU and recall of the quantised mask and MSE of the raw 8-bit "
    "prediction (3 channels, in [0, 1]) per picture, then the mean over pictures; empty truth with empty mask scores 1"
)
COLUMNS = ("iou", "recall", "mse", "boundary_iou")
DECIMALS = 6
PROTOCOLS = ("per_image", "glass", "translab")
HALF = 128  # from here on a grey means glass
CLASS_COLOURS = {0: 0, 85: THINGS, 255: STUFF}


@dataclass(frozen=True)
class PictureScore:
    """The scores of one picture; `empty_truth` and `empty_mask` say that no pixel is transparent."""

    name: str
    difficulty: str
    iou: float
    recall: float
    mse: float
    boundary_iou: float
    empty_truth: bool
    empty_mask: bool


def score_picture(
    prediction: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    name: str = "",
    difficulty: str = "",
) -> PictureScore:
    """Scores one picture under the per-image protocol of the published end-to-end run.

    IoU = |mask and truth| / |mask or truth| and recall = |mask and truth| / |truth|, where an empty truth scores 1 in
    both if the mask is empty too and 0 otherwise; MSE = mean over pixels and channels of (prediction / 255 - truth)^2. Boundary IoU
    stands beside them, see `utils.protocols.boundary_iou`.

    Args:
        prediction: raw prediction (H, W, 3), uint8.
        mask: quantised prediction (H, W), bool.
        truth: ground truth (H, W), bool.
        name: of the picture.
        difficulty: of the picture, may be empty.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if mask.shape != truth.shape or prediction.shape != (*truth.shape, 3):
        raise ValueError(f"shapes differ: prediction {prediction.shape}, mask {mask.shape}, truth {truth.shape}")
    true_positives, positives = int((mask & truth).sum()), int(truth.sum())
    union = int((mask | truth).sum())
    # In integers until the last division, so that the result does not depend on the order of summation; by counts of each grey
    # level, because pictures may have many millions of pixels.
    levels = np.arange(256)
    inside, outside = (np.bincount(prediction[part].ravel(), minlength=256) for part in (truth, ~truth))
    mse = int((inside * (255 - levels) ** 2 + outside * levels**2).sum()) / (prediction.size * 255 * 255)
    return PictureScore(
        name=name,
        difficulty=difficulty,
        iou=true_positives / union if union else 1.0,
        recall=true_positives / positives if positives else float(union == 0),
        mse=mse,
        boundary_iou=boundary_iou(mask, truth),
        empty_truth=positives == 0,
        empty_mask=not mask.any(),
    )


def iou_curves(histograms: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the IoU of each picture's soft mask, quantised at each of 256 thresholds.

    Args:
        histograms: of `utils.protocols.histogram`, (N, 2, 256).

    Returns:
        (N, 256): entry k is that of the pixels of at least k; an empty truth with an empty mask scores 1.
    """
    counts = at_least(histograms)
    hits, claimed = counts[:, 0], counts[:, 1]
    union = claimed + hits[:, :1] - hits
    return np.where(union > 0, hits / np.maximum(union, 1), 1.0)


def best_threshold(curves: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the threshold with the best mean IoU over pictures, and that IoU.

    Args:
        curves: (N, 256), of `iou_curves`.

    Returns:
        A threshold between two grey levels, to be exceeded, and the mean IoU at it; the lowest of equals.
    """
    means = curves[:, 1:].mean(axis=0)  # a threshold of 0 would be exceeded nowhere or everywhere
    best = int(means.argmax())
    return round((best + 0.5) / 255, DECIMALS), float(means[best])


def summarise(scores: Sequence[PictureScore]) -> dict[str, Any]:
    """Returns the means over pictures, at the top level for all and under each difficulty that occurs."""
    summary: dict[str, Any] = {**_means(scores), "protocol": PROTOCOL}
    for difficulty in sorted({score.difficulty for score in scores} - {""}):
        summary[difficulty] = _means([score for score in scores if score.difficulty == difficulty])
    return summary


def score_folder(folder: Path) -> list[PictureScore]:
    """Scores every `NAME_maskq.png` of a folder against `NAME_maskgt.png`, and `NAME_pred.png` for the MSE.

    Difficulties come from `per_image.csv` where the folder has one.

    Raises:
        InputError: naming the folder or file that is missing, unreadable or of another size.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of predictions")
    names = sorted(path.name.removesuffix("_maskq.png") for path in folder.glob("*_maskq.png"))
    if not names:
        raise InputError(f"{folder}: holds no NAME_maskq.png; give a folder that val_inference.py wrote")
    difficulties = {}
    table = folder / "per_image.csv"
    if table.is_file():
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row.get("name")]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{table}: cannot be read ({first_line(error)}); repair or remove it") from error
        difficulties = {row["name"]: row.get("difficulty") or "" for row in rows}
        if odd := sorted(set(difficulties.values()) - {"", "easy", "hard"}):
            raise InputError(f"{table}: difficulty {odd[0]!r} is unknown; easy, hard or nothing")
    scores = []
    for name in names:
        truth, mask = (read_mask(folder, name, kind) for kind in ("maskgt", "maskq"))
        prediction = _read(folder / f"{name}_pred.png", "RGB")
        try:
            scores.append(score_picture(prediction, mask, truth, name, difficulties.get(name, "")))
        except ValueError as error:
            raise InputError(f"{folder / name}_*.png: {error}") from error
    return scores


def read_mask(folder: Path, name: str, kind: str) -> NDArray[np.bool_]:
    """Returns where a written mask is glass, (H, W): brighter than half, or any colour but black where masks tell classes.

    Raises:
        InputError: naming the file that is missing or unreadable.
    """
    level = 0 if (folder / f"{name}_classes.png").is_file() else 127
    return _read(folder / f"{name}_{kind}.png", "RGB").max(axis=2) > level


def score_folders(predictions: Path, truths: Path, protocols: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores a folder of predicted masks against a folder of true ones, matched by name (`_mask` at its end is left out).

    Under `per_image` and `glass` a coloured mask, or one of Trans10k's greys 0, 85 and 255 alone, has glass where it is not black,
    another from 128 on; a prediction's other greys are its certainty, which is resized to the truth's size (bilinear). Maps of class
    ids, whose greys all lie below 128, are refused. Under `translab` both are label maps in Trans10k's greys, taken to 512 x 512 by
    nearest neighbour.

    Returns:
        The figures of each protocol by its name.

    Raises:
        InputError: naming what is missing, unreadable or no label map.
    """
    pairs = _match(predictions, truths)
    per_image: list[PictureScore] = []
    glass: list[GlassRecord] = []
    translab: list[TransLabRecord] = []
    brightest = 0
    for name, (prediction_path, truth_path) in pairs.items():
        if "translab" in protocols:
            labels = [_labels(path, _read(path, "L")) for path in (prediction_path, truth_path)]
            translab.append(score_translab(labels[0], labels[1]))
        soft, greys = _greys(prediction_path), _greys(truth_path)
        brightest = max(brightest, int(soft.max()))
        if 0 < greys.max() < HALF:
            raise InputError(
                f"{truth_path}: its brightest grey is {greys.max()}, a map of class ids? Write truths as black and white, or in colours"
            )
        truth = greys >= HALF
        if soft.shape != truth.shape:
            soft = np.array(Image.fromarray(soft).resize(truth.shape[::-1], Image.Resampling.BILINEAR))
        mask = soft >= HALF
        if "per_image" in protocols:
            per_image.append(score_picture(np.repeat(soft[..., None], 3, axis=2), mask, truth, name))
        if "glass" in protocols:
            glass.append(score_glass(soft, truth))
    if 0 < brightest < HALF:
        raise InputError(
            f"{predictions}: the brightest grey of all is {brightest}, maps of class ids? Write predictions as black and white, or as "
            "certainties from 0 to 255"
        )
    results: dict[str, dict[str, Any]] = {}
    if per_image:
        results["per_image"] = summarise(per_image)
    if glass:
        results["glass"] = summarise_glass(glass)
    if translab:
        results["translab"] = dict(summarise_translab(translab))
    return results


def _match(predictions: Path, truths: Path) -> dict[str, tuple[Path, Path]]:
    """Returns the files of both folders by name."""
    found = []
    for folder in (predictions, truths):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of masks")
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.png")):
            name = path.stem.removesuffix("_mask")
            if name in files:
                raise InputError(f"{folder}: {files[name].name} and {path.name} are masks of one name; remove one")
            files[name] = path
        if not files:
            raise InputError(f"{folder}: holds no PNG")
        found.append(files)
    if odd := sorted(found[0].keys() ^ found[1].keys()):
        place = predictions if odd[0] in found[0] else truths
        raise InputError(
            f"{place}: {len(odd)} masks are in one folder alone, {odd[0]} here among them; the names must match"
        )
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def _greys(path: Path) -> NDArray[np.uint8]:
    """Returns a mask's greys (H, W); of a coloured one, and one of Trans10k's classes, white for all but black."""
    pixels = _read(path, "RGB")
    grey = pixels.max(axis=2)
    of_classes = (pixels != pixels[..., :1]).any() or set(np.unique(grey).tolist()) <= CLASS_COLOURS.keys()
    return (grey > 0) * np.uint8(255) if of_classes else grey


def _labels(path: Path, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a map of Trans10k's classes (512, 512) of its greys."""
    resized = np.array(Image.fromarray(values).resize((TRANSLAB_SIDE, TRANSLAB_SIDE), Image.Resampling.NEAREST))
    if odd := set(np.unique(resized).tolist()) - CLASS_COLOURS.keys():
        raise InputError(
            f"{path}: grey {min(odd)} is no class; the translab protocol takes label maps of 0 (background), 85 (things), 255 (stuff)"
        )
    table = np.zeros(256, np.uint8)
    table[list(CLASS_COLOURS)] = list(CLASS_COLOURS.values())
    return table[resized]


def _means(scores: Sequence[PictureScore]) -> dict[str, Any]:
    means: dict[str, Any] = {
        column: round(float(np.mean([asdict(score)[column] for score in scores])), DECIMALS) for column in COLUMNS
    }
    means["num_images"] = len(scores)
    means["num_empty_truth"] = sum(score.empty_truth for score in scores)
    means["num_empty_truth_and_mask"] = sum(score.empty_truth and score.empty_mask for score in scores)
    return means


def _read(path: Path, mode: str) -> NDArray[np.uint8]:
    try:
        with open_picture(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which a conversion would clip
                return np.array(
                    Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8)).convert(mode)
                )
            return np.array(image.convert(mode))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; each NAME needs _maskq, _pred and _maskgt") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def main() -> None:
    """Command line: scores a folder, or one against another, and prints the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder with NAME_maskq.png, NAME_pred.png, NAME_maskgt.png; or masks"
    )
    parser.add_argument("truths", type=Path, nargs="?", help="folder of true masks of the same names")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, help="with TRUTHS: what to score by [per_image]")
    parser.add_argument("--per_image", action="store_true", help="print name,iou,recall,mse as CSV instead")
    arguments = parser.parse_args()
    if arguments.truths is not None:
        print(
            json.dumps(score_folders(arguments.folder, arguments.truths, arguments.protocol or ["per_image"]), indent=2)
        )
        return
    if arguments.protocol:
        raise InputError("--protocol: needs two folders, PREDICTIONS and TRUTHS")
    scores = score_folder(arguments.folder)
    if arguments.per_image:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("name", "iou", "recall", "mse"))
        writer.writerows(
            (score.name, *(round(v, DECIMALS) for v in (score.iou, score.recall, score.mse))) for score in scores
        )
    else:
        print(json.dumps(summarise(scores), indent=2))


if __name__ == "__main__":
    run_command(main)
