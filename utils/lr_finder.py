"""Learning-rate range test (arXiv 1506.01186): the loss while the rate grows from tiny to too large.

`python -m utils.lr_finder` takes the files and flags of trainer.py. It trains for a few updates with the run's own models, data
and optimiser, at a rate that grows by the same factor each time, and throws the weights away; output_dir is not touched.
Two rates are found: where the loss falls fastest per decade, which is on the low side, and a tenth of where it diverges, on the high
side. Suggested is their geometric mean, but nothing above the rate of the smallest loss. The loss is smoothed by a straight line
through what lies within half a decade of each rate.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from accelerate import PartialState
from accelerate.utils import set_seed
from numpy.typing import NDArray

from dataset.trans10k import scan
from models.trainable import check_settings
from trainer import Trainer
from utils.config import Config, parse_config
from utils.engine import build_accelerator
from utils.errors import InputError, TrainingDivergedError, keep_until_exit, run_command
from utils.plan import TrainingPlan
from utils.plots import COLOURS, save_figure, smooth
from utils.rehearsal import rehearsal_config
from utils.signals import StopRequests

DIVERGED = 2.0  # times the smallest moving average of the loss
WINDOW_DECADES = 0.5  # on either side
MIN_UPDATES = 10


@dataclass(frozen=True)
class RangePlan(TrainingPlan):
    """A training whose rate grows by the same factor from update to update.

    Args:
        min_lr: rate of the first update.
        max_lr: rate of the last.
    """

    min_lr: float
    max_lr: float

    def rate(self, step: int) -> float:
        """Returns the learning rate of an update, counted from 0."""
        return self.min_lr * (self.max_lr / self.min_lr) ** (step / (self.total_steps - 1))

    def __str__(self) -> str:
        """Describes the plan in one line."""
        return f"range test: {self.total_steps} updates of {self.effective_batch_size} pictures, rate {self.min_lr:g} to {self.max_lr:g}"


def is_diverging(losses: NDArray[np.float64]) -> bool:
    """Returns whether the moving average of the (N,) losses so far is `DIVERGED` times the smallest that it was; not at the start."""
    averages = smooth(losses)
    return len(losses) > MIN_UPDATES and bool(averages[-1] > DIVERGED * averages.min())


def fit_lines(
    decades: NDArray[np.float64], losses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns value and slope of the straight line through what lies within `WINDOW_DECADES` of each point; no moving average's lag.

    Args:
        decades: (N,), logarithms of the rates.
        losses: (N,), finite.
    """
    window = max(WINDOW_DECADES, 2 * float(decades[1] - decades[0]))
    near = [np.abs(decades - place) <= window for place in decades]
    lines = [
        np.polyfit(decades[inside] - place, losses[inside], 1) for inside, place in zip(near, decades, strict=True)
    ]
    slopes, values = np.array(lines).T
    return values, slopes


def suggest(rates: NDArray[np.float64], losses: NDArray[np.float64], diverged: bool) -> dict[str, float | None]:
    """Finds the rates that a range test speaks for.

    Args:
        rates: (N,), growing.
        losses: (N,), finite.
        diverged: whether the test ended because the loss did.

    Returns:
        `steepest`, where the loss falls fastest per decade before its smallest value, None if it never falls; `lowest`, where it
        is smallest; `tenth_of_divergence`, None if it did not diverge; `suggestion`, None if the loss never falls.
    """
    values, slopes = fit_lines(np.log10(rates), losses)
    lowest = int(values.argmin())
    steepest = int(slopes[: lowest + 1].argmin())
    tenth = float(rates[-1]) / 10 if diverged else None
    found = {"steepest": float(rates[steepest]), "lowest": float(rates[lowest]), "tenth_of_divergence": tenth}
    if slopes[steepest] >= 0:
        return {**found, "steepest": None, "suggestion": None}
    middle = math.sqrt(rates[steepest] * (tenth or rates[steepest]))
    return {**found, "suggestion": min(middle, float(rates[lowest]))}


def plot(rates: NDArray[np.float64], losses: NDArray[np.float64], found: dict[str, float | None]) -> Any:
    """Returns the figure of a range test: the loss over the rate, and what was found."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    smoothed, _ = fit_lines(np.log10(rates), losses)
    axes.plot(rates, losses, color=COLOURS[0], linewidth=0.7, alpha=0.4, label="loss of each update")
    axes.plot(rates, smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed within half a decade")
    styles = {"steepest": ("0.45", ":"), "tenth_of_divergence": ("0.45", "--"), "suggestion": (COLOURS[5], "-")}
    for name, (colour, style) in styles.items():
        if (rate := found[name]) is not None:
            label = f"{name.replace('_', ' ')}: {rate:.2g}"
            axes.axvline(rate, color=colour, linestyle=style, linewidth=1.4, label=label)
    low, high = float(losses.min()), float(np.quantile(losses, 0.9))  # what diverges is cut off
    margin = 0.2 * (high - low)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - margin, high + 2 * margin))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def run_range_test(
    config: Config, min_lr: float, max_lr: float, updates: int
) -> tuple[RangePlan, list[float], list[float], bool]:
    """Trains at growing rates until the loss diverges; called by all processes.

    Args:
        config: of the run.
        min_lr: rate of the first update.
        max_lr: rate of the last.
        updates: at most.

    Returns:
        The plan, the rate and the loss of each update whose loss was finite, and whether it diverged.
    """
    check_settings(config)
    stop = StopRequests()
    train = scan(config.dataset_name, config.dataset_path, "train", mismatched_pairs=config.mismatched_pairs)
    rates: list[float] = []
    losses: list[float] = []
    diverged = False
    shared_cache = config.latent_cache_path is not None and Path(config.latent_cache_path).is_dir()
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = replace(
            rehearsal_config(config, folder, updates),
            # Filling a cache takes longer than the test, so only one that is there is used.
            latent_cache=config.latent_cache if shared_cache else "off",
            ema_decay=None,
        )
        accelerator = build_accelerator(rehearsal)
        stop.share()
        accelerator.print(train)
        set_seed(rehearsal.seed)
        make_plan = partial(RangePlan, min_lr=min_lr, max_lr=max_lr)
        trainer = keep_until_exit(Trainer(rehearsal, accelerator, train, None, stop, make_plan))
        with closing(trainer.rehearse()) as rows:
            try:
                for row in rows:
                    rates.append(row["lr"])
                    losses.append(row["loss"])
                    if diverged := is_diverging(np.array(losses)):
                        break
            except TrainingDivergedError:
                diverged = True
        trainer.monitor.close()
    assert isinstance(trainer.plan, RangePlan)
    return trainer.plan, rates, losses, diverged


def write_results(
    out: Path, config: Config, plan: RangePlan, rates: list[float], losses: list[float], diverged: bool
) -> str:
    """Writes OUT.png, OUT.svg, OUT.csv and OUT.json.

    Returns:
        What was found, in words, with the flag to use.

    Raises:
        InputError: if the range was too high from the start, or the files cannot be written.
    """
    if len(rates) < MIN_UPDATES:
        raise InputError(
            f"the loss diverged after {len(rates)} updates, at a rate below {plan.rate(len(rates)):.2g}; lower --min_lr"
        )
    x, y = np.array(rates), np.array(losses)
    found, (smoothed, _) = suggest(x, y, diverged), fit_lines(np.log10(x), y)
    stem = out.with_suffix("") if out.suffix in (".png", ".svg", ".csv", ".json") else out
    written = [
        *save_figure(plot(x, y, found), stem),
        *(stem.with_name(f"{stem.name}.{end}") for end in ("csv", "json")),
    ]
    with written[2].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("lr", "loss", "smoothed_loss"), *zip(rates, losses, smoothed.tolist(), strict=True)]
        )
    rate = found["suggestion"]
    scale = plan.effective_batch_size if config.scale_lr else 1
    flag = None if rate is None else f"--lr {rate / scale:.2g}"
    record = {**found, "diverged": diverged, "effective_batch_size": plan.effective_batch_size, "flag": flag}
    written[3].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    ending = (
        f"diverged at {rates[-1]:.2g}"
        if diverged
        else f"did not diverge up to {rates[-1]:.2g}; a higher --max_lr tells more"
    )
    lines = [", ".join(map(str, written)), f"the loss {ending}"]
    if rate is None or flag is None:
        return "\n".join([*lines, "it never fell, so no rate is suggested: look at the plot"])
    scaled = f" (scale_lr makes {rate:.2g} of it at an effective batch of {scale})" if config.scale_lr else ""
    for name, value in found.items():
        lines.append(f"{name.replace('_', ' ')}: {'-' if value is None else f'{value:.2g}'}")
    return "\n".join([*lines, f"peak rate of the configuration: {plan.peak_rate:.2g}", f"use {flag}{scaled}"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lr_finder",
        usage="%(prog)s [--min_lr X] [--max_lr X] [--updates N] [--out FILE] [--config FILE]... [--KEY VALUE]...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--min_lr", type=float, default=1e-7, help="rate of the first update [1e-7]")
    parser.add_argument("--max_lr", type=float, default=1.0, help="rate of the last [1]")
    parser.add_argument("--updates", type=int, default=100, help="at most [100]")
    parser.add_argument("--out", type=Path, help="FILE.png, .svg, .csv and .json are written [OUTPUT_DIR_lr_finder]")
    arguments, rest = parser.parse_known_args()
    if not 0 < arguments.min_lr < arguments.max_lr < math.inf or arguments.updates < MIN_UPDATES:
        raise InputError(f"expected 0 < --min_lr < --max_lr, and --updates of at least {MIN_UPDATES}")
    config, _ = parse_config(rest)
    out = arguments.out or Path(f"{config.output_dir.rstrip('/')}_lr_finder")
    plan, rates, losses, diverged = run_range_test(config, arguments.min_lr, arguments.max_lr, arguments.updates)
    if PartialState().is_main_process:
        print(write_results(out, config, plan, rates, losses, diverged))


if __name__ == "__main__":
    run_command(main)
