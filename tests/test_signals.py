"""Requests to stop: the first signal asks, an impatient one ends, and a dead launcher is noticed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import environment
from utils import signals
from utils.errors import EXIT_SIGINT, EXIT_SIGTERM
from utils.signals import LAUNCHER_VARIABLES, PATIENCE_SECONDS, StopRequests


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Gives the signals back to whoever had them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


class LeftError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that is moved on by calling it, and an os._exit that can be caught."""
    now = 1000.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    def leave(code: int) -> None:
        raise LeftError(code)

    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals.os, "_exit", leave)
    return advance


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, EXIT_SIGINT), (signal.SIGTERM, EXIT_SIGTERM)])
def test_the_first_signal_only_asks(number: int, code: int, after: Callable[[float], None]) -> None:
    stop = StopRequests()
    assert stop.poll() == 0
    signal.raise_signal(number)
    assert stop.poll() == code
    after(3600)
    assert stop.poll() == code  # time alone ends nothing


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_signals_within_the_patience_do_not_kill(second: int, after: Callable[[float], None]) -> None:
    stop = StopRequests()
    signal.raise_signal(signal.SIGINT)
    for seconds in (0.0, 0.1, PATIENCE_SECONDS - 0.2):
        after(seconds)
        signal.raise_signal(second)
    assert stop.poll() in (EXIT_SIGINT, EXIT_SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, EXIT_SIGINT), (signal.SIGTERM, EXIT_SIGTERM)])
def test_a_signal_seconds_later_ends_the_process_at_once(
    number: int, code: int, after: Callable[[float], None]
) -> None:
    StopRequests()
    signal.raise_signal(number)
    after(PATIENCE_SECONDS + 0.1)
    with pytest.raises(LeftError) as caught:
        signal.raise_signal(number)
    assert caught.value.args == (code,)


def test_the_patience_counts_from_the_first_signal(after: Callable[[float], None]) -> None:
    StopRequests()
    signal.raise_signal(signal.SIGTERM)
    after(PATIENCE_SECONDS * 0.75)
    signal.raise_signal(signal.SIGTERM)
    after(PATIENCE_SECONDS * 0.75)  # less than the patience after the last one
    with pytest.raises(LeftError):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("variable", LAUNCHER_VARIABLES)
def test_the_death_of_the_launcher_is_noticed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "x")
    monkeypatch.setattr(signals.os, "getppid", lambda: 4321)
    stop = StopRequests()
    assert stop.poll() == 0
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.poll() == EXIT_SIGTERM


def test_a_launchers_death_does_not_hide_a_signal_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHER_VARIABLES[0], "no")
    monkeypatch.setattr(signals.os, "getppid", lambda: 4321)
    stop = StopRequests()
    signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.poll() == EXIT_SIGINT


def test_a_parent_that_is_no_launcher_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequests()
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.poll() == 0  # as under nohup
    assert StopRequests().poll() == 0  # as in a container


@pytest.mark.parametrize(("is_launcher", "code"), [(False, EXIT_SIGTERM), (True, 0)])
def test_a_launcher_that_died_before_the_first_look_is_noticed_unless_it_is_process_1_itself(
    is_launcher: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER_VARIABLES[0], "no")
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    monkeypatch.setattr(signals, "_is_launcher", lambda process: process == 1 and is_launcher)
    stop = StopRequests()
    assert stop.exit_code == stop.poll() == code


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(("word", "expected"), [("accelerate", True), ("torchrun", True), ("init", False)])
def test_a_launcher_is_known_by_its_command_line(word: str, expected: bool) -> None:
    command = ["/bin/sh", "-c", "echo ready; read line", word]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"  # before that the command line may still be empty
        assert signals._is_launcher(process.pid) == expected
    finally:
        process.communicate()
    assert not signals._is_launcher(process.pid)  # gone


def test_a_real_process_survives_two_quick_signals_and_leaves_by_a_late_one() -> None:
    program = (
        "import signal\n"
        "from utils import signals\n"
        "stop = signals.StopRequests()\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print(stop.poll(), flush=True)\n"
        "signals.PATIENCE_SECONDS = -1.0\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert (done.returncode, done.stdout) == (EXIT_SIGINT, "130\n"), done.stderr
