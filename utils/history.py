"""`history.csv`: what a run measured, row by row, without any tracker."""

from __future__ import annotations

import csv
from pathlib import Path

COLUMNS = (
    "step", "epoch", "loss", "latent_loss", "pixel_loss", "lr", "grad_norm", "samples_per_second", "data_wait", "memory_gb", "val_iou", "val_recall", "val_mse",
)  # fmt: skip


class History:
    """Appends rows to a run's history.

    Args:
        path: of the CSV file.
        resumed_step: rows after this update are cut off; 0 starts anew.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        rows = read_history(path) if resumed_step and path.is_file() else []
        kept = [row for row in rows if int(row["step"]) <= resumed_step]
        partial = path.with_suffix(".part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)

    def append(self, **values: float | int | None) -> None:
        """Adds a row; columns that are not given stay empty.

        Raises:
            ValueError: for a column that the file does not have.
        """
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(values)


def read_history(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a history, leaving out a last row that a kill cut short."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    return [row for row in rows if (row["step"] or "").isdigit() and None not in row.values()]
