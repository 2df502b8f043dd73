"""How a command ends: exit codes, and one clear line for what went wrong."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar, cast

Kept = TypeVar("Kept")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

_kept: list[Any] = []

UNUSABLE_PATHS = ("Symlink loop", "Could not determine home directory")  # pathlib's words
OUT_OF_MEMORY = ("out of memory", "allocate memory", "enough memory")
FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class CommandError(Exception):
    """Ends a command with a message for its user and an exit code, without a traceback."""

    exit_code = EXIT_FAILED


class InputError(CommandError):
    """Bad input: the message names the file, key or value and the remedy. Exit code 2."""

    exit_code = EXIT_BAD_INPUT


class TrainingDivergedError(CommandError):
    """The loss stopped being finite. Exit code 1."""


class InterruptedRunError(CommandError):
    """A signal, or the launcher's death, asked the run to leave.

    Args:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM or when the launcher is gone.
    """

    def __init__(self, message: str, exit_code: int = EXIT_SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: Exception) -> str:
    """Returns an error's message as one line.

    A data-loader worker wraps an error's message into its own traceback; the message is the last line of that.
    """
    message = str(error).strip()
    if message.startswith("Caught ") and "Traceback" in message:
        message = message.splitlines()[-1].split("Error: ", 1)[-1]
    return " ".join(message.split())


def first_line(error: Exception, limit: int = 200) -> str:
    """Returns the first non-empty line of a foreign error, cut to `limit` characters, to quote inside a message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:limit]


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error tells that the machine's memory, or a card's, does not suffice."""
    # PyTorch has an error of its own for a card and none for the machine.
    told = str(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(words in told for words in OUT_OF_MEMORY)


def keep_until_exit(value: Kept) -> Kept:
    """Returns a value that outlives the command's `main`.

    Engines' objects wait for other processes when they are destroyed, and these may have left by then.
    """
    _kept.append(value)
    return value


class _Patient:
    """A stream whose reader may leave (`| head`): what is printed then goes nowhere, and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal has no letter for

    def write(self, text: str) -> int:
        """Writes a text."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Writes what was held back."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        """Returns whatever else the stream has."""
        return getattr(self._stream, name)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits the process with its code; known errors become one line on stderr."""
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Patient(stream)) for stream in streams)
    try:
        code = main() or 0
    except CommandError as error:
        # Its traceback holds what `main` held. In a lone process loaders must end before the interpreter does.
        if several_processes:
            keep_until_exit(error)
        code = _tell(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        code = _tell("interrupted", EXIT_SIGINT)
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN and error.filename is None:
            raise
        what = "cannot be written" if error.errno in FULL_OR_FORBIDDEN else "cannot be used"
        code = _tell(f"{error.filename or 'a file'}: {what} ({error.strerror})", EXIT_FAILED)
    except RuntimeError as error:
        if not str(error).startswith(UNUSABLE_PATHS):
            raise
        code = _tell(f"{first_line(error).rstrip('.')}; check the paths that the command names", EXIT_BAD_INPUT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
    if several_processes:
        # After an error another process may wait in a collective for this one, and a normal exit would wait for it in turn;
        # after success gloo's threads now and then abort the interpreter's exit.
        os._exit(code)
    sys.exit(code)


def _tell(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
