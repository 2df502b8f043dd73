"""Experiment trackers beside `history.csv`, through Accelerate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from utils.config import Config
from utils.errors import InputError, first_line

PROJECT_NAME = "sd3-transparency"
PANEL = "validation/panel"
REQUIREMENTS = {"trackio": "requirements-trackio.txt"}  # the others are in requirements-trackers.txt


def check_tracker(tracker: str) -> list[str]:
    """Returns the names of Accelerate's trackers for the key `tracker`.

    Raises:
        InputError: if the package is not installed.
    """
    if tracker == "none":
        return []
    if importlib.util.find_spec(tracker) is None:
        requirements = REQUIREMENTS.get(tracker, "requirements-trackers.txt")
        raise InputError(f"tracker: {tracker} is not installed; pip install -r {requirements}, or tracker: none")
    return [tracker]


def start_tracker(accelerator: Accelerator, config: Config) -> None:
    """Starts the run's tracker, if it has one: without a question, a login or a server, unless the environment names one.

    wandb goes offline where nobody is logged in; trackio and mlflow write into the run's folder.

    Raises:
        InputError: if the tracker cannot be started, before the training has begun.
    """
    if config.tracker == "none":
        return
    folder = Path(config.output_dir).resolve()
    init: dict[str, Any] = {}
    if config.tracker == "wandb":
        if "WANDB_MODE" not in os.environ and not _wandb_login():
            os.environ["WANDB_MODE"] = "offline"
        init = {"dir": config.output_dir, "name": folder.name}
    elif config.tracker == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        init = {"name": folder.name, "resume": "allow", "embed": False}
    elif config.tracker == "mlflow":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        init = {"run_name": folder.name}
        if "MLFLOW_TRACKING_URI" not in os.environ:
            (folder / "mlflow").mkdir(parents=True, exist_ok=True)
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
            init["logging_dir"] = (folder / "mlflow" / "artifacts").as_uri()
    values = {name: "null" if value is None else value for name, value in asdict(config).items()}
    try:
        accelerator.init_trackers(PROJECT_NAME, config=values, init_kwargs={config.tracker: init} if init else {})
    except Exception as error:  # each has exceptions of its own, for servers, logins and files
        raise InputError(
            f"tracker: {config.tracker} could not be started ({first_line(error)}); set it up, or take tracker: none"
        ) from error


class Tracking:
    """What a run tells its tracker; the first failure ends that, with one warning, and never the training.

    Args:
        accelerator: of the run, whose tracker `start_tracker` has started.
        say: prints a line.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.accelerator, self.say = accelerator, say

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers of update `step`."""
        self._attempt(lambda: self.accelerator.log(dict(values), step=step))

    def log_panel(self, panel: NDArray[np.uint8], step: int) -> None:
        """Sends a picture (H, W, 3) of update `step`."""
        for tracker in self.accelerator.trackers:
            self._attempt(lambda tracker=tracker: _SEND[tracker.name](tracker, panel, step))  # type: ignore[misc]

    def close(self) -> None:
        """Ends the tracker's run and the process group."""
        self._attempt(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        self.accelerator.trackers = []
        self.accelerator.end_training()

    def _attempt(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # a full disk, a server that is gone; each tracker has exceptions of its own
            names = ", ".join(tracker.name for tracker in self.accelerator.trackers)
            self.accelerator.trackers = []
            self.say(
                f"warning: tracker: {names} failed and gets nothing more ({first_line(error)}); history.csv goes on"
            )


def _send_to_mlflow(tracker: Any, panel: NDArray[np.uint8], step: int) -> None:
    import mlflow

    mlflow.log_image(panel, key=PANEL, step=step)


def _send_to_trackio(tracker: Any, panel: NDArray[np.uint8], step: int) -> None:
    import trackio

    tracker.log({PANEL: trackio.Image(panel)}, step=step)


_SEND: dict[str, Callable[[Any, NDArray[np.uint8], int], None]] = {
    "wandb": lambda tracker, panel, step: tracker.log_images({PANEL: [panel]}, step=step),
    "tensorboard": lambda tracker, panel, step: tracker.log_images({PANEL: panel[None]}, step=step, dataformats="NHWC"),
    "trackio": _send_to_trackio,
    "mlflow": _send_to_mlflow,
}


def _wandb_login() -> bool:
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
