"""Experiment trackers beside `history.csv`, through Accelerate."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from utils.config import Config
from utils.errors import InputError

PROJECT_NAME = "sd3-transparency"


def check_tracker(tracker: str) -> list[str]:
    """Returns the names of Accelerate's trackers for the key `tracker`.

    Raises:
        InputError: if the package is not installed.
    """
    if tracker == "none":
        return []
    if importlib.util.find_spec(tracker) is None:
        raise InputError(
            f"tracker: {tracker} is not installed; pip install -r requirements-trackers.txt, or tracker: none"
        )
    return [tracker]


def start_tracker(accelerator: Accelerator, config: Config) -> None:
    """Starts the run's tracker, if it has one; wandb goes offline without a question where nobody is logged in."""
    if config.tracker == "none":
        return
    if config.tracker == "wandb" and "WANDB_MODE" not in os.environ and not _wandb_login():
        os.environ["WANDB_MODE"] = "offline"
    init = (
        {"wandb": {"dir": config.output_dir, "name": Path(config.output_dir).name}} if config.tracker == "wandb" else {}
    )
    values = {name: "null" if value is None else value for name, value in asdict(config).items()}
    accelerator.init_trackers(PROJECT_NAME, config=values, init_kwargs=init)


def _wandb_login() -> bool:
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
