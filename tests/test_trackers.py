"""Experiment trackers: what is started, and what happens where nobody is logged in."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, Launch
from utils.config import FIELDS, Config
from utils.errors import InputError
from utils.history import read_history
from utils.trackers import PANEL, Tracking, check_tracker, start_tracker

TRACKERS = ["wandb", "tensorboard", "trackio", "mlflow"]


class FakeAccelerator:
    """Records what it is asked to start."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def init_trackers(self, project_name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.calls.append((project_name, config, init_kwargs))


class FakeTracker:
    """Records what it is sent, until it breaks."""

    name = "tensorboard"

    def __init__(self, works: int = 100) -> None:
        self.works = works
        self.sent: list[tuple[Any, ...]] = []
        self.attempts = 0

    def _take(self, *sent: Any) -> None:
        self.attempts += 1
        if self.attempts > self.works:
            raise RuntimeError("the server is gone\nand here are its last words")
        self.sent.append(sent)

    def log(self, values: dict[str, float], step: int) -> None:
        self._take(values, step)

    def log_images(self, values: dict[str, Any], step: int, **settings: str) -> None:
        self._take({name: value.shape for name, value in values.items()}, step, settings)

    def finish(self) -> None:
        self._take("finish")


class RunningAccelerator:
    """What `Tracking` uses of an accelerator."""

    def __init__(self, tracker: FakeTracker) -> None:
        self.trackers = [tracker]
        self.ended = 0

    def log(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step)

    def end_training(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.ended += 1


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which nobody is logged in; returns its netrc's path."""
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    # Set first, so that what a test's subject sets is taken back.
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
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


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"tracker: {tracker} is not installed") as caught:
        check_tracker(tracker)
    (file,) = [word.rstrip(",") for word in str(caught.value).split() if word.startswith("requirements-")]
    assert f"\n{tracker}==" in f"\n{(ROOT / file).read_text()}"


@pytest.mark.parametrize("tracker", TRACKERS)
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


def test_trackio_and_mlflow_write_into_the_runs_folder(nobody: Path, tmp_path: Path) -> None:
    import os

    accelerator = FakeAccelerator()
    for tracker in ("trackio", "mlflow"):
        start_tracker(accelerator, replace(Config(), tracker=tracker, output_dir=str(tmp_path / "a run")))  # type: ignore[arg-type]
    (_, _, trackio), (_, _, mlflow) = accelerator.calls
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "a run" / "trackio")
    assert trackio["trackio"]["name"] == mlflow["mlflow"]["run_name"] == "a run"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'a run' / 'mlflow' / 'mlflow.db'}"
    assert mlflow["mlflow"]["logging_dir"] == (tmp_path / "a run" / "mlflow" / "artifacts").as_uri()


def test_the_users_own_server_is_kept(nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    accelerator = FakeAccelerator()
    start_tracker(accelerator, replace(Config(), tracker="mlflow", output_dir=str(tmp_path)))  # type: ignore[arg-type]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://somewhere:5000"
    assert accelerator.calls[0][2] == {"mlflow": {"run_name": tmp_path.name}}
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_does_not_start_is_bad_input(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FakeAccelerator, "init_trackers", refuse)
    with pytest.raises(InputError, match=r"tensorboard could not be started \(no route to host\).*tracker: none"):
        start("tensorboard")


def test_numbers_and_panels_are_sent_and_the_run_is_ended() -> None:
    tracker = FakeTracker()
    accelerator = RunningAccelerator(tracker)
    tracking = Tracking(accelerator, print)  # type: ignore[arg-type]
    tracking.log({"loss": 0.5}, 3)
    tracking.log_panel(np.zeros((8, 6, 3), np.uint8), 3)
    tracking.close()
    assert tracker.sent == [({"loss": 0.5}, 3), ({PANEL: (1, 8, 6, 3)}, 3, {"dataformats": "NHWC"}), ("finish",)]
    assert accelerator.ended == 1


@pytest.mark.parametrize("works", [0, 1, 2])
def test_a_tracker_that_fails_is_left_alone_with_one_warning(works: int) -> None:
    tracker, said = FakeTracker(works), list[str]()
    accelerator = RunningAccelerator(tracker)
    tracking = Tracking(accelerator, said.append)  # type: ignore[arg-type]
    tracking.log({"loss": 0.5}, 1)
    tracking.log_panel(np.zeros((8, 8, 3), np.uint8), 1)
    tracking.log({"loss": 0.25}, 2)
    tracking.close()
    assert said == [
        "warning: tracker: tensorboard failed and gets nothing more (the server is gone); history.csv goes on"
    ]
    assert tracker.attempts == works + 1
    assert accelerator.ended == 1


def test_a_tracker_that_cannot_finish_does_not_keep_the_processes_together() -> None:
    tracker, said = FakeTracker(0), list[str]()
    accelerator = RunningAccelerator(tracker)
    Tracking(accelerator, said.append).close()  # type: ignore[arg-type]
    assert len(said) == accelerator.ended == 1


def recorded_by_tensorboard(run: Path) -> tuple[dict[int, float], set[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = [path.parent for path in run.glob("*/events*")]
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    return {each.step: each.value for each in events.Scalars("loss")}, {each.step for each in events.Images(PANEL)}


def recorded_by_wandb(run: Path) -> tuple[dict[int, float], set[int]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    data, start = path.read_bytes(), 7  # LevelDB's log format, of which a short run fills less than a block
    losses, panels = {}, set()
    while start < len(data):
        end = start + 7 + int.from_bytes(data[start + 4 : start + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[start + 7 : end])
        values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "loss" in values:
            losses[int(values["_step"])] = float(values["loss"])
        if any(name.startswith(PANEL) for name in values):
            panels.add(int(values["_step"]))
        start = end
    return losses, panels


def recorded_by_trackio(run: Path) -> tuple[dict[int, float], set[int]]:
    import json
    import sqlite3

    with sqlite3.connect(next(run.glob("trackio/*.db"))) as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics")]
    return {step: row["loss"] for step, row in rows if "loss" in row}, {step for step, row in rows if PANEL in row}


def recorded_by_mlflow(run: Path) -> tuple[dict[int, float], set[int]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    losses = {each.step: each.value for each in client.get_metric_history(found.info.run_id, "loss")}
    names = [path.name for path in run.glob("mlflow/artifacts/*/artifacts/images/*.png")]
    return losses, {int(name.split("+step+")[1].split("+")[0]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_every_tracker_records_a_run_without_login_server_or_question(
    tracker: str, flags: dict[str, object], launch: Launch, nobody: Path, tmp_path: Path
) -> None:
    pytest.importorskip(tracker)
    done = launch("trainer.py", {**flags, "tracker": tracker, "val_steps": 3})
    assert "warning: tracker" not in done.stdout
    losses, panels = globals()[f"recorded_by_{tracker}"](tmp_path / "run")
    history = {
        int(row["step"]): float(row["loss"]) for row in read_history(tmp_path / "run" / "history.csv") if row["loss"]
    }
    assert losses == pytest.approx(history, rel=1e-6)
    assert panels == {3, 6}
