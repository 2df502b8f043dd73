"""`predictions.jsonl`: which file was predicted into which outputs, so that a run can go on and overwrites nothing of others."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

from utils.errors import InputError
from utils.prediction_inputs import Source

FILE_NAME = "predictions.jsonl"


class PredictionRecord:
    """Remembers what an output folder holds; every line is written once its files are whole.

    Args:
        folder: of the outputs; made if it is missing.
        settings: what the outputs depend on.
        overwrite: forgets what is there, which is then replaced.

    Raises:
        InputError: if the folder cannot be written, is another run's at the moment, or holds outputs of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.folder, self.path = folder, folder / FILE_NAME
        self.overwrite = overwrite
        self.names: dict[str, str] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # a long line is written in parts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._running = self._claim()
            if self.path.exists() and self.path.stat().st_size and not overwrite:
                self._read(settings)
            else:
                partial = self.path.with_suffix(".part")
                partial.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
                partial.replace(self.path)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from error

    def _claim(self) -> IO[str]:
        """Returns the open lock of the folder, which the system takes back when the process ends."""
        lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise InputError(
                f"{self.folder}: another run writes into it; wait for it, or choose another --output"
            ) from error
        except OSError:  # a disk without locks
            pass
        return lock

    def _read(self, settings: dict[str, Any]) -> None:
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line short
            entries = [json.loads(line) for line in whole.splitlines()]
            before = dict(entries[0]["settings"])
            for entry in entries[1:]:
                name = str(entry["name"])
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"the name {name!r} leads elsewhere")
                if "files" in entry:
                    self._done[entry["input"]] = {"state": list(entry["state"]), **entry, "files": list(entry["files"])}
                if "error" not in entry:  # only what was found free is this list's own
                    self.names[entry["input"]] = name
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.path}: is no list of predictions; choose another --output, or --overwrite"
            ) from error
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            details = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise InputError(
                f"{self.folder}: holds predictions of other settings ({details}); choose another --output, or --overwrite"
            )
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def is_done(self, source: Source) -> bool:
        """Returns whether a file was predicted, has not changed since, and its outputs are there."""
        entry = self._done.get(source.key)
        return (
            entry is not None
            and entry["state"] == _state_of(source.path)
            and all((self.folder / name).is_file() for name in entry["files"])
        )

    def start(self, source: Source, files: list[str], inputs: Set[str] = frozenset()) -> None:
        """Takes the names of a file's outputs before they are written.

        Args:
            source: to be predicted.
            files: that will be written.
            inputs: keys of all files to be predicted.

        Raises:
            InputError: if one exists that no run into this folder has written, or is itself to be predicted.
        """
        eaten = [name for name in files if os.path.abspath(self.folder / name) in inputs]  # noqa: PTH100
        if eaten:
            raise InputError(
                f"{self.folder / eaten[0]}: is an input, and would be written over; choose another --output"
            )
        if source.key not in self.names:
            strangers = [name for name in files if os.path.exists(self.folder / name)]  # noqa: PTH110  pathlib's raises on names too long
            if strangers and not self.overwrite:
                raise InputError(
                    f"{self.folder / strangers[0]}: exists already and is not of this list; move it, or --overwrite"
                )
            self._append({"input": source.key, "name": source.name})
            self.names[source.key] = source.name

    def finish(self, source: Source, files: list[str], **details: Any) -> None:
        """Adds a file whose outputs are written, with details to keep."""
        entry = {"input": source.key, "name": source.name, "state": _state_of(source.path), "files": files, **details}
        self._append(entry)
        self._done[source.key] = entry

    def fail(self, source: Source, reason: str) -> None:
        """Adds a file that could not be predicted; a later run tries again."""
        self._append({"input": source.key, "name": source.name, "error": reason})

    def finished(self) -> list[dict[str, Any]]:
        """Returns what `finish` kept of all files, of earlier runs too, in the order of their names."""
        return sorted(self._done.values(), key=lambda entry: str(entry["name"]))

    def write_whole(self, name: str, text: str) -> None:
        """Writes a file about all predictions, in the place of an earlier one.

        Raises:
            InputError: if one exists that no run into this folder has written.
        """
        if os.path.exists(self.folder / name) and name not in self.names and not self.overwrite:  # noqa: PTH110
            raise InputError(f"{self.folder / name}: exists already and is not of this list; move it, or --overwrite")
        self._append({"input": name, "name": name})
        partial = self.folder / f".part-{name}"
        partial.unlink(missing_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / name)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _state_of(path: Path) -> list[int]:
    """Returns size and time of change, which tell whether a file is still the same."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
