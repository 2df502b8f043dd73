"""What an inference leaves behind: PNGs written in the background, tables, JSON and CSV, a contact sheet.

`python -m utils.report FOLDER OUT.png` puts predictions of a folder side by side: picture, truth, raw, quantised.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.errors import CommandError, InputError, run_command
from utils.metrics import COLUMNS, DECIMALS, PictureScore, iou_curves
from utils.protocols import precision_recall

MAX_PENDING_PICTURES = 64
DETAILS_FILE_NAME = "inference.json"


class BackgroundPngWriter:
    """Writes `NAME_KIND.png` files from a few threads; a context manager that waits for them.

    Args:
        folder: existing folder that the files go to.
        num_threads: PNG compression releases the interpreter lock, so threads do.

    Raises:
        CommandError: on leaving, if a file could not be written.
    """

    def __init__(self, folder: Path, num_threads: int = 2) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(num_threads)
        self._slots = threading.BoundedSemaphore(MAX_PENDING_PICTURES)
        self._futures: list[Future[None]] = []

    def __enter__(self) -> BackgroundPngWriter:
        """Returns itself."""
        return self

    def __call__(self, name: str, pictures: dict[str, NDArray[np.uint8]]) -> None:
        """Queues a picture's files; waits only when the disk falls far behind."""
        self._slots.acquire()
        self._futures = [future for future in self._futures if not future.done() or future.exception()]
        self._futures.append(self._pool.submit(self._write, name, pictures))

    def __exit__(self, exception_type: type[BaseException] | None, *details: object) -> None:
        """Waits for the queue, or drops it after an exception."""
        self._pool.shutdown(wait=True, cancel_futures=exception_type is not None)
        if exception_type is None:
            for future in self._futures:
                if error := future.exception():
                    raise CommandError(f"{self.folder}: a prediction could not be written ({error})") from error

    def _write(self, name: str, pictures: dict[str, NDArray[np.uint8]]) -> None:
        try:
            for kind, values in pictures.items():
                Image.fromarray(values).save(self.folder / f"{name}_{kind}.png", compress_level=3)
        finally:
            self._slots.release()


def write_evaluation(folder: Path, evaluation: dict[str, Any], histograms: NDArray[np.int64]) -> None:
    """Writes `evaluation.json` and `curves.json`: mean IoU, precision and recall at every threshold.

    Args:
        folder: existing.
        evaluation: threshold, intervals, calibration and the figures of every protocol.
        histograms: of the pictures' soft masks, (N, 2, 256), see `utils.protocols.histogram`.
    """
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    precision, recall = precision_recall(histograms).mean(axis=0)
    curves = {"iou": iou_curves(histograms).mean(axis=0), "precision": precision, "recall": recall}
    content = {name: [round(float(value), DECIMALS) for value in values] for name, values in curves.items()}
    (folder / "curves.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_scores(folder: Path, summary: dict[str, Any], scores: Sequence[PictureScore]) -> None:
    """Writes `metrics.json` and `per_image.csv`."""
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "per_image.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "difficulty", *COLUMNS))
        for score in scores:
            values = (round(getattr(score, column), DECIMALS) for column in COLUMNS)
            writer.writerow((score.name, score.difficulty, *values))


def format_table(summary: dict[str, Any], label: str = "mix") -> str:
    """Returns a table with a row for the whole (called `label`) and one for each difficulty."""
    rows = [(label, summary)]
    if label == "mix":
        rows += [(name, summary[name]) for name in ("easy", "hard") if name in summary]
    names = " ".join(f"{name:>8}" for name in ("IoU", "recall", "MSE"))
    lines = [f"{'':<10} {names} {'boundary IoU':>13} {'pictures':>9} {'without glass':>14}"]
    for name, values in rows:
        numbers = " ".join(f"{values[column]:>8.4f}" for column in ("iou", "recall", "mse"))
        numbers += f" {values['boundary_iou']:>13.4f}"
        lines.append(f"{name:<10} {numbers} {values['num_images']:>9} {values['num_empty_truth']:>14}")
    return "\n".join(lines)


def format_protocols(protocols: dict[str, dict[str, Any]]) -> str:
    """Returns a line for each protocol and size with its figures, classes and difficulties left out."""
    lines = []
    for protocol, sizes in protocols.items():
        for size, figures in sizes.items():
            shown = {name: value for name, value in figures.items() if isinstance(value, float)}
            lines.append(
                f"{protocol:<10} {size:<9} " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
            )
    return "\n".join([*lines, "* the size at which the protocol's own papers score"])


def contact_sheet(folder: Path, number: int, columns: int = 2) -> Image.Image:
    """Puts `number` predictions, spread evenly over a folder, side by side: picture, truth, raw, quantised.

    Raises:
        InputError: if the folder holds no predictions.
    """
    kinds = ("img", "maskgt", "pred", "maskq")
    names = sorted(path.name.removesuffix("_maskq.png") for path in folder.glob("*_maskq.png"))
    if not names:
        raise InputError(f"{folder}: holds no NAME_maskq.png; give a folder that val_inference.py wrote")
    chosen = [names[position * len(names) // number] for position in range(min(number, len(names)))]
    tiles = [[np.array(Image.open(folder / f"{name}_{kind}.png").convert("RGB")) for kind in kinds] for name in chosen]
    strips = [np.pad(np.concatenate(tile, axis=1), ((2, 2), (4, 4), (0, 0)), constant_values=255) for tile in tiles]
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % columns)
    rows = [np.concatenate(strips[start : start + columns], axis=1) for start in range(0, len(strips), columns)]
    return Image.fromarray(np.concatenate(rows))


def place_for(folder: Path, details: dict[str, Any]) -> Path:
    """Returns where an inference's results go: `folder`, or `folder-2` and so on where others with other details lie before.

    Args:
        folder: of the results.
        details: that the folder's `inference.json` will hold; one with the same is replaced.
    """
    candidates = (folder.with_name(f"{folder.name}-{number}" if number > 1 else folder.name) for number in count(1))
    for place in candidates:
        try:
            if json.loads((place / DETAILS_FILE_NAME).read_text(encoding="utf-8")) == details:
                return place
        except (OSError, ValueError):
            return place
    raise AssertionError("unreachable")


def replace_folder(partial: Path, final: Path) -> None:
    """Moves a complete folder to its place; an existing one is replaced whole."""
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
        partial.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.replace(final)


def main() -> None:
    """Command line: writes a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that val_inference.py wrote")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--count", type=int, default=12, help="pictures, spread evenly over the folder [12]")
    arguments = parser.parse_args()
    contact_sheet(arguments.folder, arguments.count).save(arguments.out)


if __name__ == "__main__":
    run_command(main)
