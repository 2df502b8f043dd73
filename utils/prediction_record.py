"""`predictions.jsonl`: which file was predicted into which outputs, so that a run can go on and overwrites nothing of others."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

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
        InputError: if the folder cannot be written, or holds outputs of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.folder, self.path = folder, folder / FILE_NAME
        self.overwrite = overwrite
        self.names: dict[str, str] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # a long line is written in parts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not overwrite:
                self._read(settings)
            else:
                self.path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from error

    def _read(self, settings: dict[str, Any]) -> None:
        # A kill may have cut the last line short.
        lines = [
            line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
        ]
        try:
            entries = [json.loads(line) for line in lines]
            before = entries[0]["settings"]
            for entry in entries[1:]:
                self.names[entry["input"]] = entry["name"]
                if "files" in entry:
                    self._done[entry["input"]] = entry
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{self.path}: is no list of predictions; choose another --output, or --overwrite"
            ) from error
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            details = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise InputError(
                f"{self.folder}: holds predictions of other settings ({details}); choose another --output, or --overwrite"
            )
        self.path.write_text("".join(lines), encoding="utf-8")

    def is_done(self, source: Source) -> bool:
        """Returns whether a file was predicted, has not changed since, and its outputs are there."""
        entry = self._done.get(source.key)
        return (
            entry is not None
            and entry["state"] == _state_of(source.path)
            and all((self.folder / name).is_file() for name in entry["files"])
        )

    def start(self, source: Source, files: list[str]) -> None:
        """Takes the names of a file's outputs before they are written.

        Raises:
            InputError: if one exists that no run into this folder has written.
        """
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

    def details(self, source: Source) -> dict[str, Any]:
        """Returns what `finish` kept of a file, nothing if it is not done."""
        return self._done.get(source.key, {})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _state_of(path: Path) -> list[int]:
    """Returns size and time of change, which tell whether a file is still the same."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
