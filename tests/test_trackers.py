"""Experiment trackers: what is started, and what happens where nobody is logged in."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from utils.config import FIELDS, Config
from utils.errors import InputError
from utils.trackers import check_tracker, start_tracker


class FakeAccelerator:
    """Records what it is asked to start."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def init_trackers(self, project_name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.calls.append((project_name, config, init_kwargs))


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which nobody is logged in; returns its netrc's path."""
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    # Set first, so that what a test's subject sets is taken back.
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return netrc


def start(tracker: str) -> FakeAccelerator:
    accelerator = FakeAccelerator()
    start_tracker(accelerator, replace(Config(), tracker=tracker, output_dir="runs/mine"))  # type: ignore[arg-type]
    return accelerator


def wandb_mode() -> str | None:
    import os

    return os.environ.get("WANDB_MODE")


def test_no_tracker_starts_nothing() -> None:
    assert check_tracker("none") == []
    assert start("none").calls == []


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"tracker: {tracker} is not installed.*requirements-trackers.txt"):
        check_tracker(tracker)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_installed_is_used(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert check_tracker(tracker) == [tracker]


def test_wandb_goes_offline_where_nobody_is_logged_in(nobody: Path) -> None:
    ((_, _, init),) = start("wandb").calls
    assert wandb_mode() == "offline"
    assert init == {"wandb": {"dir": "runs/mine", "name": "mine"}}


def test_wandb_stays_online_with_a_key(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    start("wandb")
    assert wandb_mode() is None


def test_wandb_stays_online_with_a_login(nobody: Path) -> None:
    nobody.write_text("machine api.wandb.ai login user password secret\n")
    start("wandb")
    assert wandb_mode() is None


def test_the_users_own_mode_is_kept(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start("wandb")
    assert wandb_mode() == "disabled"


def test_tensorboard_gets_every_key_as_a_value_that_it_can_store(nobody: Path) -> None:
    ((_, values, init),) = start("tensorboard").calls
    assert wandb_mode() is None
    assert init == {}
    assert set(values) == set(FIELDS)
    assert all(isinstance(value, (bool, int, float, str)) for value in values.values())
    assert values["max_train_steps"] == "null"
