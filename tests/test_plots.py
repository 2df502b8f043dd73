"""Plots: what is read of a history, what is smoothed and marked, how a schedule is drawn with and without its data set."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from utils import plots
from utils.config import Config
from utils.errors import InputError
from utils.history import COLUMNS
from utils.plan import TrainingPlan
from utils.plots import plot_runs, plot_schedule, read_curves, save_figure, schedule_of, smooth


def write_history(folder: Path, rows: int = 4, columns: tuple[str, ...] = COLUMNS) -> Path:
    """Writes rows every 10 updates with a validation after each second one."""
    folder.mkdir(parents=True)
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        for number in range(1, rows + 1):
            values: dict[str, Any] = {"loss": 1 / number, "latent_loss": 1 / number, "lr": 0.001, "grad_norm": "nan"}
            writer.writerow({"step": 10 * number, "epoch": number, "memory_gb": 2.5, "data_wait": 0.1, **values})
            if number % 2 == 0:
                writer.writerow({"step": 10 * number, "val_iou": 0.6 - number / 100, "val_mse": 0.2 - number / 100})
    return folder


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_only_finite_values_are_read(tmp_path: Path) -> None:
    curves = read_curves(write_history(tmp_path / "run"))
    assert set(curves) == {"loss", "latent_loss", "lr", "memory_gb", "data_wait", "val_iou", "val_mse"}
    steps, values = curves["loss"]
    assert steps.tolist() == [10, 20, 30, 40]
    assert values.tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert curves["val_iou"][0].tolist() == [20, 40]
    assert read_curves(tmp_path / "run" / "history.csv").keys() == curves.keys()


def test_an_older_history_is_read(tmp_path: Path) -> None:
    old = tuple(name for name in COLUMNS if name not in ("memory_gb", "data_wait"))
    assert "memory_gb" not in read_curves(write_history(tmp_path / "run", columns=old))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as a history"),
        ("step,loss\r\n", "holds no row yet"),
        ("name,iou\r\na,1\r\n", "cannot be read as a history"),
        ("step,loss\r\n1,high\r\n", "loss holds something else than numbers"),
        (f"step,loss\r\n{'9' * 400},1\r\n", "step holds a number that is too large"),
        ("step,loss\r\n1,1e308\r\n2,-1e308\r\n", "holds no row yet"),
    ],
)
def test_what_is_no_history_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "history.csv").write_text(text, newline="")
    with pytest.raises(InputError, match=message) as caught:
        read_curves(tmp_path)
    assert str(tmp_path / "history.csv") in str(caught.value)


def test_a_moving_average_is_not_drawn_towards_zero() -> None:
    assert smooth(np.full(5, 3.0)) == pytest.approx([3.0] * 5)
    assert smooth(np.array([1.0, 2.0]), 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


def test_a_run_has_a_panel_for_every_column_and_its_best_validation_is_marked(tmp_path: Path) -> None:
    figure = plot_runs({"mine": read_curves(write_history(tmp_path / "run"))})
    expected = "loss|validation IoU|validation MSE|learning rate|peak memory of a process, GB|share of the time waiting for data"
    assert titles(figure) == expected.split("|")  # the loss on latents is the loss
    iou, mse = figure.axes[1], figure.axes[2]
    assert [text.get_text() for text in iou.texts] == ["0.580"]
    assert iou.lines[1].get_xdata() == [20]
    assert [text.get_text() for text in mse.texts] == ["0.160"]
    assert figure.axes[3].get_ylim()[0] == 0


def test_runs_lie_over_each_other_in_their_own_colours(tmp_path: Path) -> None:
    runs = {name: read_curves(write_history(tmp_path / name, rows)) for name, rows in (("a", 4), ("b", 40))}
    figure = plot_runs(runs)
    first, *others = figure.axes[0].lines
    assert first.get_color() == plots.COLOURS[0]
    assert [line.get_color() for line in others] == [plots.COLOURS[1]] * 2  # rows and their moving average
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert "moving average" in legend.get_title().get_text()


def test_the_same_curves_give_the_same_bytes(tmp_path: Path) -> None:
    curves = {"mine": read_curves(write_history(tmp_path / "run"))}
    first = save_figure(plot_runs(curves), tmp_path / "one" / "curves")
    second = save_figure(plot_runs(curves), tmp_path / "two" / "curves.svg")
    assert [path.name for path in first] == [path.name for path in second] == ["curves.png", "curves.svg"]
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_a_schedule_shows_what_the_trainer_will_do(trans10k: Path) -> None:
    config = replace(
        Config(), dataset_path=str(trans10k), train_batch_size=1, lr=1e-3, scale_lr=True, epochs=4, min_lr_ratio=0.25
    )
    plan, axis = schedule_of(config, 2)
    assert (axis, plan.total_steps, plan.warmup_steps, plan.effective_batch_size) == ("epoch", 6, 2, 4)
    figure = plot_schedule(plan, axis)
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert line.get_ydata().tolist() == [plan.rate(step) for step in range(6)]
    assert max(line.get_ydata()) == plan.peak_rate == 4e-3
    marks = [text.get_text() for text in figure.axes[0].texts]
    assert marks == [" warm-up", "peak 0.004", "floor 0.001"]
    assert figure.axes[0].child_axes[0].get_xlabel() == "epoch"
    assert "effective batch 4 = 1 per process x 2 accumulated x 2 processes" in figure.get_suptitle()


def test_a_schedule_without_its_data_set_is_over_the_share_of_the_training() -> None:
    config = replace(Config(), dataset_path="missing", epochs=10, lr_warmup_epochs=1.0)
    plan, axis = schedule_of(config, 1)
    assert axis == "share"
    line = plot_schedule(plan, axis).axes[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert x[0] == 0
    assert x[-1] == pytest.approx(100, abs=0.1)
    assert x[y.argmax()] == pytest.approx(10, abs=0.1)  # the end of the warm-up


def test_a_length_in_updates_needs_no_data_set() -> None:
    config = replace(
        Config(), dataset_path="missing", epochs=None, max_train_steps=50, lr_warmup_epochs=None, lr_warmup_steps=5
    )
    plan, axis = schedule_of(config, 1)
    assert (axis, plan.total_steps, plan.warmup_steps) == ("update", 50, 5)
    assert plot_schedule(plan, axis).axes[0].child_axes == []


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3, "lr_warmup_epochs": None, "lr_warmup_steps": 5},
        {"epochs": None, "max_train_steps": 9, "lr_warmup_epochs": 1.0},
    ],
)
def test_two_units_cannot_be_put_together_without_a_data_set(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no such data set folder.*both in epochs or both in updates"):
        schedule_of(replace(Config(), dataset_path="missing", **changes), 1)


def test_the_checkpoints_of_a_run_are_counted() -> None:
    def saves(total: int, every: int | None, done: int = 0) -> int:
        config = Config(max_train_steps=total, epochs=None, save_checkpoint_steps=every, save_checkpoint_epochs=None)
        return TrainingPlan(config, 4, 5).num_saves(done)

    assert [saves(10, 5), saves(11, 5), saves(10, None), saves(10, 20)] == [2, 3, 1, 1]
    assert [saves(10, 5, 5), saves(10, 5, 7), saves(11, 5, 7), saves(10, 5, 10)] == [1, 1, 2, 0]


def test_the_rates_course_is_told_in_words() -> None:
    config = replace(
        Config(), epochs=None, max_train_steps=100, lr_warmup_epochs=None, lr_warmup_steps=10, scale_lr=False, lr=1.0
    )
    told = TrainingPlan(config, 4, 5).describe_rate()
    assert (
        told == "linear warm-up over 10 updates to 1, then 3.5 cosine periods between 1 and 0.1, 0.1 at the last update"
    )
    constant = TrainingPlan(replace(config, lr_scheduler="constant", lr_warmup_steps=0), 4, 5).describe_rate()
    assert constant == "constant at 1, 1 at the last update"


def test_the_command_draws_runs_and_schedules(
    trans10k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plot(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["plots", *map(str, arguments)])
        plots.main()
        return capsys.readouterr().out.split()

    run = write_history(tmp_path / "run")
    assert plot(run) == [str(run / "curves.png"), str(run / "curves.svg")]
    schedule = ("--plot_schedule", "--config", ROOT / "configs/tiny.yaml", "--lr", "1e-3", "--dataset_path", trans10k)
    expected = [str(tmp_path / "later" / f"schedule.{end}") for end in ("png", "svg")]
    assert plot(*schedule, "--output_dir", tmp_path / "later", "--num_processes", 2) == expected
    with pytest.raises(InputError, match=r"unknown flag --lrr \(did you mean --lr\?\)"):
        plot("--plot_schedule", "--lrr", "1")
    with pytest.raises(InputError, match="--num_processes: 0"):
        plot("--plot_schedule", "--num_processes", "0")
