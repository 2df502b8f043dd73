"""Signals, a dead launcher and kills: whatever happens, the run goes on from a whole checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from models.base import load_transformer
from tests.conftest import ROOT, Launch, arguments_of, environment
from utils.checkpoints import checkpoints_folder, list_checkpoints, read_state
from utils.history import read_history

ENDLESS = {
    "max_train_steps": 1_000_000,
    "save_checkpoint_steps": 1_000_000,
    "val_steps": "null",
    "lr_scheduler": "constant",
}
PATIENCE_SECONDS = 120


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Starts a command in a group of its own, and leaves nothing of it behind."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def trainer_command(flags: dict[str, object]) -> list[str]:
    return [sys.executable, str(ROOT / "trainer.py"), *arguments_of(flags)]


def wait_for_updates(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Waits until the history shows that many updates; a process that ends before fails the test."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        history = run / "history.csv"
        if history.is_file() and len(read_history(history)) >= count:
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    pytest.fail("the training did not get going")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(
    number: signal.Signals, code: int, flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # With loader processes: the signal reaches the whole group, and they must not take the trainer down.
    with started(trainer_command({**flags, **ENDLESS, "dataloader_num_workers": 2})) as process:
        wait_for_updates(run, 2, process)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, output[-3000:]
    assert "error: asked to stop; saved update" in output
    assert "Traceback" not in output
    ((step, _),) = list_checkpoints(run)
    launch(
        "trainer.py", {**flags, "max_train_steps": step + 2, "val_steps": "null", "resume_from_checkpoint": "latest"}
    )
    assert list_checkpoints(run)[-1][0] == step + 2


def test_a_trainer_whose_launcher_died_saves_and_leaves(flags: dict[str, object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate/cpu.yaml"),
    ]
    with started([*launcher, *trainer_command({**flags, **ENDLESS})[1:]]) as process:
        wait_for_updates(run, 2, process)
        process.kill()
        # The trainer holds the other end of the pipe, so this waits for it too.
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert "saved update" in output
    assert len(list_checkpoints(run)) == 1


@pytest.mark.slow
def test_twenty_kills_leave_only_whole_checkpoints(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**flags, **ENDLESS, "save_checkpoint_steps": 1, "checkpoints_total_limit": 2, "val_steps": 7}
    rng = random.Random(0)
    reached = 0
    for attempt in range(20):
        resume = {"resume_from_checkpoint": "latest"} if reached else {}
        with started(trainer_command({**settings, **resume})) as process:
            wait_for_updates(run, 0, process)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not any(step > reached for step, _ in list_checkpoints(run)) and time.monotonic() < deadline:
                assert process.poll() is None, process.communicate()[0][-3000:]
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        complete = list_checkpoints(run)
        assert complete[-1][0] > reached, f"attempt {attempt} did not go further"
        reached = complete[-1][0]
        for step, path in complete:
            assert read_state(path).global_step == step
            load_transformer(path)
            load_file(path / "optimizer.safetensors")
    launch("trainer.py", {**settings, "max_train_steps": reached + 1, "resume_from_checkpoint": "latest"})
    assert not list(checkpoints_folder(run).glob(".*")), "half-written leftovers"
