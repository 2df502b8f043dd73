"""Draws what runs recorded, and learning-rate schedules before a run starts; each as PNG and SVG, without any tracker.

`python -m utils.plots RUN [RUN...]` draws the curves of `RUN/history.csv`, several runs over each other.
`python -m utils.plots --plot_schedule` takes the files and flags of trainer.py and draws the rate of every update; without the
data set, whose size gives the updates, over the share of the training.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.lines
import numpy as np
from numpy.typing import NDArray

from dataset.sampling import BatchStream
from dataset.trans10k import scan
from utils.config import Config, parse_config
from utils.errors import InputError, run_command
from utils.history import read_history
from utils.plan import TrainingPlan

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # Okabe and Ito's, for any eyes
SMOOTHED = ("loss", "latent_loss", "pixel_loss", "grad_norm")
SMOOTHING = 0.9
LARGEST = 1e100  # of a value that can be drawn
MIN_ROWS_TO_SMOOTH = 30
LOG_RANGE = 30.0  # of the largest value to the smallest, from which on a positive axis is logarithmic
BEST = {"val_iou": max, "val_recall": max, "val_mse": min}
TITLES = {
    "loss": "loss",
    "latent_loss": "loss on latents",
    "pixel_loss": "loss on pixels",
    "val_iou": "validation IoU",
    "val_recall": "validation recall",
    "val_mse": "validation MSE",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "memory_gb": "peak memory of a process, GB",
    "samples_per_second": "pictures per second",
    "data_wait": "share of the time waiting for data",
}
FROM_ZERO = ("lr", "memory_gb", "samples_per_second")
NUM_COLUMNS = 3
SHARE_STEPS = 1000  # batches an epoch where the data set is unknown: enough that a share is one to a thousandth

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def read_curves(run: Path) -> dict[str, Curve]:
    """Returns what a run recorded by column, each as updates and finite values; columns without any are left out.

    Raises:
        InputError: if there is no history, or an empty or a foreign one.
    """
    path = run if run.is_file() else run / "history.csv"
    try:
        rows = read_history(path)
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as a history; give folders of runs that trainer.py wrote") from error
    curves: dict[str, Curve] = {}
    for column in TITLES:
        try:
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: {column} holds something else than numbers ({error})") from error
        if points := [point for point in points if abs(point[1]) < LARGEST]:
            try:
                steps, values = np.array(points, np.float64).T
            except OverflowError as error:
                raise InputError(f"{path}: step holds a number that is too large") from error
            curves[column] = (steps, values)
    if not curves:
        raise InputError(f"{path}: holds no row yet; one is written every log_steps updates")
    return curves


def smooth(values: NDArray[np.float64], factor: float = SMOOTHING) -> NDArray[np.float64]:
    """Returns the exponential moving average of (N,) values, without a bias towards 0 at the start."""
    averages, average = np.empty(len(values)), 0.0
    for number, value in enumerate(values):
        average = factor * average + (1 - factor) * value
        averages[number] = average / (1 - factor ** (number + 1))
    return averages


def plot_runs(curves: dict[str, dict[str, Curve]]) -> matplotlib.figure.Figure:
    """Returns the curves of runs, by label and column, as small multiples; runs lie over each other."""
    columns = [name for name in TITLES if any(name in run for run in curves.values())]
    if all(_same(run, "loss", "latent_loss") for run in curves.values()) and "latent_loss" in columns:
        columns.remove("latent_loss")  # the only loss there is
    count = -(-len(columns) // NUM_COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(4 * NUM_COLUMNS, 0.5 + 2.5 * count), layout="constrained")
    grid = figure.subplots(count, NUM_COLUMNS, squeeze=False)
    last = max(steps[-1] for run in curves.values() for steps, _ in run.values())
    smoothed = False
    for column, axes in zip(columns, grid.flat, strict=False):
        for colour, run in zip(_colours(len(curves)), curves.values(), strict=True):
            if column in run:
                smoothed |= _draw(axes, column, *run[column], colour)
        values = np.concatenate([run[column][1] for run in curves.values() if column in run])
        if column == "data_wait":
            axes.set_ylim(0, max(0.1, 1.1 * values.max()))  # a wait of a few per cent looks like one
        elif column in FROM_ZERO:
            axes.set_ylim(bottom=0)
        elif column not in BEST and values.min() > 0 and values.max() > LOG_RANGE * values.min():
            axes.set_yscale("log")
        axes.set_title(TITLES[column], fontsize=10, loc="left")
        axes.set_xlim(0, last * 1.02)
        _tidy(axes)
    for number, axes in enumerate(grid.flat):
        if number >= len(columns):
            axes.set_axis_off()
        elif number + NUM_COLUMNS >= len(columns):
            axes.set_xlabel("update")
    notes = [f"bold: moving average over rows, factor {SMOOTHING:g}; pale: the rows"] if smoothed else []
    if any(name in columns for name in BEST):
        notes.append("circle: best validation")
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, label=label)
        for colour, label in zip(_colours(len(curves)), curves, strict=True)
    ]
    title = "; ".join(notes)
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, title=title)
    legend.set_alignment("left")
    return figure


def plot_schedule(plan: TrainingPlan, axis: str) -> matplotlib.figure.Figure:
    """Returns the learning rate of every update.

    Args:
        plan: of the run.
        axis: see `schedule_of`.
    """
    total, peak, known = plan.total_steps, plan.peak_rate, axis != "share"
    steps = np.unique(np.linspace(0, total - 1, min(total, 5000)).round().astype(int))
    scale = 1.0 if known else 100.0 / total
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps * scale, [plan.rate(int(step)) for step in steps], color=COLOURS[0], linewidth=1.8)
    if plan.warmup_steps:
        axes.axvspan(0, plan.warmup_steps * scale, color="0.9", linewidth=0)
        axes.annotate(" warm-up", (0, peak * 1.045), fontsize=9, color="0.35", va="center")
    marks = {"peak": peak}
    if plan.config.lr_scheduler != "constant":
        marks["floor"] = peak * plan.config.min_lr_ratio
    for name, rate in marks.items():
        axes.axhline(rate, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(f"{name} {rate:.3g}", (1.01, rate), xycoords=("axes fraction", "data"), fontsize=9, va="center")
    axes.set(ylabel="learning rate", ylim=(0, peak * 1.1))
    axes.set_xlim(0, total * scale)
    axes.set_xlabel("update" if known else "share of the training, % (its updates are unknown without the data set)")
    if axis == "epoch":
        per_epoch = plan.batches_per_epoch / plan.config.gradient_accumulation_steps
        epochs = axes.secondary_xaxis(
            "top", functions=(partial(np.multiply, 1 / per_epoch), partial(np.multiply, per_epoch))
        )
        epochs.set_xlabel("epoch", fontsize=9)
        epochs.tick_params(labelsize=8)
    course = plan.describe_rate() if known else f"{plan.config.lr_scheduler}, peak {peak:.3g}"
    figure.suptitle(f"{course}\n{plan.describe_batch()}", fontsize=9, x=0.01, ha="left")
    _tidy(axes)
    return figure


def schedule_of(config: Config, num_processes: int) -> tuple[TrainingPlan, str]:
    """Returns a run's plan, and what its updates can be counted in; of the data set only the training pairs are counted.

    Returns:
        The plan and epoch (and updates), or without the data set update, or share where only shares of the training are known.

    Raises:
        InputError: if the data set is missing and length and warm-up are not in the same unit.
    """
    try:
        train = scan(config.dataset_name, config.dataset_path, "train", mismatched_pairs=config.mismatched_pairs)
    except InputError as error:
        in_steps = config.max_train_steps is not None
        if config.lr_warmup_epochs if in_steps else config.lr_warmup_steps:
            raise InputError(
                f"{error}; without it a schedule is drawn only where length and warm-up are both in epochs or both in updates"
            ) from error
        batch = config.train_batch_size * num_processes
        batches_per_epoch = SHARE_STEPS * config.gradient_accumulation_steps
        return TrainingPlan(config, batch, batches_per_epoch), "update" if in_steps else "share"
    stream = BatchStream(len(train.pairs), config.train_batch_size, config.seed, 0, num_processes)
    return TrainingPlan(config, stream.global_batch_size, stream.batches_per_epoch), "epoch"


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> list[Path]:
    """Writes a figure as PNG and SVG, the same bytes for the same curves.

    Args:
        figure: to write.
        path: without a suffix, or with one of the two.

    Raises:
        InputError: if the folder cannot be written.
    """
    if not path.name:
        raise InputError(f"--out {path}: is a folder; name the files in it, such as {path / 'curves'}")
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(written[0], dpi=150)
            figure.savefig(written[1], metadata={"Date": None})
    except OSError as error:
        raise InputError(f"{stem}: cannot be written ({error.strerror}); choose another --out") from error
    return written


def _draw(axes: Any, column: str, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str) -> bool:
    """Draws one run's curve; returns whether it was smoothed."""
    if column in BEST:
        axes.plot(steps, values, color=colour, marker=".", linewidth=1.4)
        best = int(np.flatnonzero(values == BEST[column](values))[0])
        axes.plot(steps[best], values[best], "o", color=colour, markersize=9, fillstyle="none", markeredgewidth=1.6)
        place = {"xytext": (0, 9), "va": "bottom"} if BEST[column] is max else {"xytext": (0, -9), "va": "top"}
        axes.annotate(
            f"{values[best]:.3f}",
            (steps[best], values[best]),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            **place,
        )
        axes.margins(y=0.2)
        return False
    if column not in SMOOTHED or len(values) < MIN_ROWS_TO_SMOOTH:
        axes.plot(steps, values, color=colour, linewidth=1.4)
        return False
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.6)
    return True


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _same(run: dict[str, Curve], first: str, second: str) -> bool:
    return first in run and second in run and np.array_equal(run[first][1], run[second][1])


def _labels(runs: Sequence[Path]) -> list[str]:
    """Returns the runs' names, with as much of their folders as tells them apart."""
    paths = [Path(str(run.resolve()).encode(errors="backslashreplace").decode()) for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    parent = Path(os.path.commonpath(paths))
    return [str(path.relative_to(parent)) if path != parent else path.name for path in paths]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.plots",
        usage="%(prog)s RUN [RUN...] [--out FILE]\n       %(prog)s --plot_schedule [--config FILE]... [--KEY VALUE]... [--out FILE]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    drawing_schedule = "--plot_schedule" in sys.argv[1:]
    parser.add_argument("--out", type=Path, help="FILE.png and FILE.svg are written [curves in the first run's folder]")
    parser.add_argument("--plot_schedule", action="store_true", help="draw the schedule [schedule in output_dir]")
    parser.add_argument("--num_processes", type=int, default=1, help="of the launch, for the schedule [1]")
    if not drawing_schedule:
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
        arguments = parser.parse_args()
        curves = {label: read_curves(run) for label, run in zip(_labels(arguments.runs), arguments.runs, strict=True)}
        first = arguments.runs[0]
        out = arguments.out or (first.parent if first.is_file() else first) / "curves"
        figure = plot_runs(curves)
    else:
        arguments, rest = parser.parse_known_args()
        if arguments.num_processes < 1:
            raise InputError(f"--num_processes: {arguments.num_processes} is not valid, expected at least 1")
        config, _ = parse_config(rest)
        figure = plot_schedule(*schedule_of(config, arguments.num_processes))
        out = arguments.out or Path(config.output_dir) / "schedule"
    for path in save_figure(figure, out):
        print(path)


if __name__ == "__main__":
    run_command(main)
