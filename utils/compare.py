"""Compares two runs picture by picture.

`python -m utils.compare RUN_A RUN_B` reads the `per_image.csv` of two folders that val_inference.py wrote, or of two runs that
hold one such folder each, and prints the mean difference B - A with its interval, and who won how many pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import InputError, first_line, run_command

NUM_RESAMPLES = 10_000
COLUMNS = ("iou", "recall", "mse", "boundary_iou")
SCORES_FILE_NAME = "per_image.csv"


def interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the 95 % interval of a mean by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        scores: (seeds, pictures); both are drawn anew, with replacement. One seed leaves the pictures.

    Returns:
        Lower and upper end; the same on every call.
    """
    rng = np.random.default_rng(0)
    seeds, pictures = scores.shape
    means = [
        scores[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, pictures, pictures))].mean()
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def find_scores(path: Path) -> Path:
    """Returns the score table of a predictions folder, or of the only predictions folder of a run.

    Raises:
        InputError: if there is none, or more than one.
    """
    if (path / SCORES_FILE_NAME).is_file():
        return path / SCORES_FILE_NAME
    found = sorted(path.glob(f"mask_predictions/*/{SCORES_FILE_NAME}"))
    if len(found) != 1:
        there = ", ".join(str(table.parent) for table in found) or "none"
        raise InputError(f"{path}: name one folder of predictions that val_inference.py wrote (there: {there})")
    return found[0]


def read_scores(table: Path) -> dict[str, dict[str, float]]:
    """Returns the scores of every picture, by difficulty and name, then by column.

    Raises:
        InputError: naming the file, if it cannot be read.
    """
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [column for column in COLUMNS if column != "boundary_iou" or column in (rows or [{}])[0]]
        scores = {
            f"{row['difficulty']}/{row['name']}": {column: float(row[column]) for column in columns} for row in rows
        }
        if odd := [name for name, row in scores.items() if not all(0 <= value <= 1 for value in row.values())]:
            raise ValueError(f"{odd[0]} has scores that are not between 0 and 1")
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{table}: cannot be read as scores ({first_line(error)})") from error
    if not scores or len(scores) != len(rows):
        raise InputError(f"{table}: holds no scores, or a picture twice")
    return scores


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compares two tables of the same pictures.

    Returns:
        By column: the means `a` and `b`, `difference` b - a, its `interval`, and `won`, `lost`, `tied` pictures of b, where a
        smaller error wins.

    Raises:
        InputError: if they score different pictures.
    """
    a, b = read_scores(first), read_scores(second)
    if a.keys() != b.keys():
        odd = min(a.keys() ^ b.keys())
        raise InputError(
            f"{first} and {second} score different pictures, {len(a.keys() ^ b.keys())} stand in one alone, {odd} among them"
        )
    result: dict[str, Any] = {"num_images": len(a)}
    for column in COLUMNS:
        if not all(column in next(iter(scores.values())) for scores in (a, b)):
            continue  # boundary IoU, in a table that was written without it
        left, right = (np.array([scores[name][column] for name in sorted(scores)]) for scores in (a, b))
        difference = right - left
        better = -difference if column == "mse" else difference
        result[column] = {
            "a": float(left.mean()),
            "b": float(right.mean()),
            "difference": float(difference.mean()),
            "interval": list(interval(difference[None])),
            "won": int((better > 0).sum()),
            "lost": int((better < 0).sum()),
            "tied": int((better == 0).sum()),
        }
    return result


def format_comparison(result: dict[str, Any]) -> str:
    """Returns the comparison as a table."""
    lines = [f"{'':<12} {'A':>7} {'B':>7} {'B - A':>8} {'95 % interval':>18} {'won':>5} {'lost':>5} {'tied':>5}"]
    for column in COLUMNS:
        if column not in result:
            continue
        row = result[column]
        low, high = row["interval"]
        means = f"{column:<12} {row['a']:>7.4f} {row['b']:>7.4f} {row['difference']:>+8.4f}"
        lines.append(f"{means} {f'{low:+.4f} to {high:+.4f}':>18} {row['won']:>5} {row['lost']:>5} {row['tied']:>5}")
    return "\n".join([*lines, f"{result['num_images']} pictures; won and lost are B's"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", type=Path, help="a run, or a folder of its predictions")
    parser.add_argument("run_b", type=Path, help="the other")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    result = compare(find_scores(arguments.run_a), find_scores(arguments.run_b))
    print(json.dumps(result, indent=2) if arguments.json else format_comparison(result))


if __name__ == "__main__":
    run_command(main)
