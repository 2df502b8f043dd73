"""A folder that a command fills file by file: it refuses what is not its own, goes on after an interruption, and is written once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from utils.errors import InputError, first_line


class OutputFolder:
    """A folder that is made from a source by a plan; a record in it tells which, and whether it is finished.

    Args:
        root: the folder.
        record_name: of the record's file in it.
        origin: what it is made from, JSON; a folder of another origin is refused.

    Raises:
        InputError: if the folder holds files and no such record.
    """

    def __init__(self, root: Path, record_name: str, origin: Mapping[str, Any]) -> None:
        self.root = root
        self.record = root / record_name
        self.origin = dict(origin)
        self._plan = ""
        if root.exists() and not root.is_dir():
            raise InputError(f"{root}: is a file; name a folder")
        self._known: dict[str, Any] = {}
        if self.record.is_file():
            try:
                self._known = dict(json.loads(self.record.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{self.record}: cannot be read ({first_line(error)}); name another folder") from error
            made_of = self._known.get("origin")
            if not isinstance(made_of, dict):
                raise InputError(f"{self.record}: names no origin; name another folder")
            other = [name for name in {**made_of, **self.origin} if made_of.get(name) != self.origin.get(name)]
            if other:
                told = ", ".join(f"{name} {made_of.get(name)} instead of {self.origin.get(name)}" for name in other)
                raise InputError(f"{root}: was made with {told}; name another folder")
        elif root.is_dir() and any(path != _unfinished(self.record) for path in root.iterdir()):
            raise InputError(f"{root}: holds files that this command did not write; name another folder or remove it")

    def begin(self, plan: object) -> bool:
        """Records what is about to be written.

        Args:
            plan: JSON; a folder that was begun by another plan is refused.

        Returns:
            Whether the folder was finished by this plan before. Files that it lacks since then are written again.

        Raises:
            InputError: if it was begun by another plan.
        """
        self._plan = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        if self._known:
            if self._known.get("plan") != self._plan:
                raise InputError(
                    f"{self.root}: was made when the source or the flags were others; remove it or name another folder"
                )
            return bool(self._known.get("finished"))
        self.root.mkdir(parents=True, exist_ok=True)
        self._write_record({"finished": False})
        return False

    def holds(self, path: PurePosixPath) -> bool:
        """Returns whether a file is there; a file that is there is whole."""
        return (self.root / path).is_file()

    def place(self, path: PurePosixPath, write: Callable[[Path], None]) -> None:
        """Writes a file beside its place and moves it there when it is whole."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _unfinished(target)
        unfinished.unlink(missing_ok=True)
        write(unfinished)
        unfinished.replace(target)

    def finish(self, content: Mapping[str, Any]) -> None:
        """Records that all is written, and what."""
        self._write_record({"finished": True, **content})

    def _write_record(self, content: Mapping[str, Any]) -> None:
        text = json.dumps({"origin": self.origin, "plan": self._plan, **content}, indent=1) + "\n"
        self.place(PurePosixPath(self.record.name), lambda path: _write_text(path, text))


def _unfinished(target: Path) -> Path:
    """Returns where a file lies until it is whole; a long name leaves no room for more, so that its end is left out."""
    return target.with_name(f".{target.name[:50]}.part")


def copy_file(source: Path, target: Path, hard_link: bool = False) -> None:
    """Copies a file's content, or makes the target another name of the same file."""
    if hard_link:
        os.link(source.resolve(), target)
    else:
        shutil.copyfile(source, target)


def check_links(root: Path, source: Path) -> None:
    """Raises InputError if a folder lies on another disk than the source, so that no hard links can lead there."""
    if _existing(root).stat().st_dev != source.stat().st_dev:
        raise InputError(
            f"--hard_links: {root} lies on another disk than {source}; leave the flag out or name a folder there"
        )


def check_space(root: Path, num_bytes: int) -> None:
    """Raises InputError if the disk that a folder is to lie on has too little space."""
    free = shutil.disk_usage(_existing(root)).free
    if num_bytes > free:
        raise InputError(
            f"{root}: needs {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some or name another disk"
        )


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
