"""How a command ends: exit codes, and one clear line for what went wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Kept = TypeVar("Kept")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

_kept: list[Any] = []

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
    """Returns whether an error tells that the machine's memory, or a card's, does not suffice.

    PyTorch has an error of its own for a card and none for the machine; what both say is the same.
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


def keep_until_exit(value: Kept) -> Kept:
    """Returns a value that outlives the command's `main`.

    Engines' objects wait for other processes when they are destroyed, and these may have left by then.
    """
    _kept.append(value)
    return value


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits the process with its code; known errors become one line on stderr."""
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        code = main() or 0
    except CommandError as error:
        # Its traceback holds what `main` held. In a lone process loaders must end before the interpreter does.
        if several_processes:
            keep_until_exit(error)
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        code = EXIT_SIGINT
    except BrokenPipeError:
        # The reader of our output (head, less) left: nothing is wrong, but flushing at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN:
            raise
        print(f"error: {error.filename or 'a file'}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        code = EXIT_FAILED
    if several_processes:
        # After an error another process may wait in a collective for this one, and a normal exit would wait for it in turn;
        # after success gloo's threads now and then abort the interpreter's exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
