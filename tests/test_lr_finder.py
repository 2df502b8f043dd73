"""The range test: what it suggests of known curves, and a real one on the tiny model."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, arguments_of, environment
from utils.config import Config
from utils.errors import InputError
from utils.lr_finder import RangePlan, fit_lines, is_diverging, suggest, write_results

RATES = np.logspace(-6, 0, 121)


def falling(centre: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A loss that falls from 2 to 1 around a rate."""
    return np.array([1 + 1 / (1 + math.exp(4 * (math.log10(rate) - math.log10(centre)))) for rate in RATES])


def test_the_rate_grows_by_the_same_factor() -> None:
    config = replace(Config(), epochs=None, max_train_steps=5, lr_warmup_epochs=None, lr_warmup_steps=3)
    plan = RangePlan(config, 4, 10, min_lr=1e-6, max_lr=1e-2)
    assert [plan.rate(step) for step in range(5)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert "5 updates of 8 pictures, rate 1e-06 to 0.01" in str(plan)


def test_lines_follow_a_line_without_lag() -> None:
    decades = np.linspace(-4, 0, 41)
    values, slopes = fit_lines(decades, 3 - 2 * decades)
    assert values == pytest.approx(3 - 2 * decades)
    assert slopes == pytest.approx(np.full(41, -2.0))


def test_few_updates_a_decade_still_have_lines() -> None:
    _, slopes = fit_lines(np.linspace(-8, 0, 9), np.linspace(8, 0, 9))
    assert slopes == pytest.approx(np.full(9, -1.0))


def test_the_suggestion_lies_between_the_steepest_fall_and_a_tenth_of_the_divergence() -> None:
    losses = np.where(RATES < 0.5, falling(1e-4), 50.0)
    found = suggest(RATES, losses, diverged=True)
    assert found["steepest"] == pytest.approx(1e-4, rel=0.15)
    assert found["tenth_of_divergence"] == pytest.approx(0.1)
    assert found["suggestion"] == pytest.approx(math.sqrt(1e-4 * 0.1), rel=0.1)


def test_nothing_above_the_smallest_loss_is_suggested() -> None:
    losses = falling(1e-5) + np.maximum(0, np.log10(RATES) + 4.5)  # rises again from 3e-5 on
    found = suggest(RATES, losses, diverged=True)
    assert found["lowest"] is not None
    assert found["lowest"] < 1e-4
    assert found["suggestion"] == found["lowest"]


def test_without_a_divergence_the_steepest_fall_is_suggested() -> None:
    found = suggest(RATES, falling(1e-3), diverged=False)
    assert found["tenth_of_divergence"] is None
    assert found["suggestion"] == found["steepest"] == pytest.approx(1e-3, rel=0.15)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    found = suggest(RATES, np.linspace(1, 2, 121), diverged=True)
    assert found["steepest"] is None
    assert found["suggestion"] is None


def test_a_loss_that_doubles_diverges_but_a_spike_and_a_start_do_not() -> None:
    flat = np.ones(30)
    assert not is_diverging(flat)
    assert not is_diverging(np.append(flat, 6.0))  # a moving average of 1.5
    assert is_diverging(np.append(flat, 30.0))
    assert is_diverging(np.append(flat, [4.0] * 6))
    assert not is_diverging(np.array([1.0, 9.0, 9.0]))


@pytest.mark.parametrize(("scale_lr", "flag"), [(True, "--lr 0.00025"), (False, "--lr 0.002")])
def test_the_flag_takes_scale_lr_into_account(scale_lr: bool, flag: str, tmp_path: Path) -> None:
    config = replace(Config(), scale_lr=scale_lr, epochs=None, max_train_steps=121)
    plan = RangePlan(config, 4, 10, min_lr=1e-6, max_lr=1.0)
    told = write_results(tmp_path / "lr.png", config, plan, RATES.tolist(), falling(2e-3).tolist(), diverged=False)
    assert f"use {flag}" in told
    assert json.loads((tmp_path / "lr.json").read_text())["flag"] == flag
    assert "did not diverge up to 1" in told


def test_a_test_that_starts_too_high_is_bad_input(tmp_path: Path) -> None:
    plan = RangePlan(replace(Config(), epochs=None, max_train_steps=20), 4, 10, min_lr=1.0, max_lr=10.0)
    with pytest.raises(InputError, match=r"diverged after 3 updates.*lower --min_lr"):
        write_results(tmp_path / "lr", Config(), plan, [1.0, 1.1, 1.3], [1.0, 2.0, 3.0], diverged=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_leaves_four_files_and_no_run(flags: dict[str, object], tmp_path: Path) -> None:
    flags |= {"latent_cache": "disk", "ema_decay": 0.9, "tracker": "none"}
    command = [sys.executable, "-m", "utils.lr_finder", "--updates", "25", "--min_lr", "1e-5", "--max_lr", "1e4"]
    done = subprocess.run(
        [*command, *arguments_of(flags)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"run_lr_finder.{end}" for end in ("csv", "json", "png", "svg")
    ]
    with (tmp_path / "run_lr_finder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["lr"]) == pytest.approx(1e-5)
    assert float(rows[1]["lr"]) / float(rows[0]["lr"]) == pytest.approx(1e9 ** (1 / 24))
    found = json.loads((tmp_path / "run_lr_finder.json").read_text())
    assert found["diverged"]
    assert 1e-5 < found["suggestion"] < 1e4
    assert done.stdout.splitlines()[-1] == f"use {found['flag']}"
