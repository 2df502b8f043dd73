"""What a user names to be predicted (files, folders, patterns, lists), and the names that its outputs get."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.pictures import ENDINGS
from utils import video
from utils.errors import InputError, first_line


@dataclass(frozen=True)
class Source:
    """A file to predict.

    Args:
        path: of the file.
        name: of its outputs, without ending: a path relative to the output folder.
    """

    path: Path
    name: str

    @property
    def key(self) -> str:
        """What tells the file from all others."""
        return os.path.abspath(self.path)  # noqa: PTH100  pathlib's would follow links

    @property
    def is_video(self) -> bool:
        """Whether its ending is that of a video."""
        return self.path.suffix.lower() in video.ENDINGS


def find_files(inputs: Sequence[str], lists: Sequence[Path], recursive: bool, output: Path) -> list[tuple[Path, str]]:
    """Returns the files that inputs name, each once, with the name that its place gives it.

    A folder's pictures keep their place below it; another file is named after itself.

    Args:
        inputs: files, folders and patterns (`photos/**/*.jpg`).
        lists: files with one input a line.
        recursive: whether folders are searched to the bottom.
        output: folder whose files are no inputs.

    Raises:
        InputError: naming an input that is nothing, or an empty folder.
    """
    wanted = [*inputs, *(line for path in lists for line in _read_list(path))]
    if not wanted:
        raise InputError("nothing to predict; name files, folders or patterns, or --list FILE")
    found: dict[str, tuple[Path, str]] = {}
    for entry in wanted:
        try:
            expanded = _expand(entry, recursive, output)
        except OSError as error:
            raise InputError(f"{entry}: cannot be read ({error.strerror})") from error
        for path, name in expanded:
            found.setdefault(os.path.realpath(path), (path, name))
    return list(found.values())


def name_files(found: Sequence[tuple[Path, str]], named: Mapping[str, str]) -> list[Source]:
    """Returns files with names that differ in more than their case.

    Where two would have one name, the later takes its ending into it, then a number.

    Args:
        found: of `find_files`.
        named: names that earlier runs gave, by key.
    """
    taken = {name.lower() for name in named.values()}
    sources = []
    for path, name in found:
        given = named.get(Source(path, name).key) or _free_name(name, path.suffix, taken)
        taken.add(given.lower())
        sources.append(Source(path, given))
    return sources


def _expand(entry: str, recursive: bool, output: Path) -> Iterable[tuple[Path, str]]:
    path = Path(entry).expanduser()
    if path.is_dir():
        if path.resolve() == output.resolve():
            raise InputError(f"--output {output}: holds the inputs; name a folder of its own for the predictions")
        own = output.resolve().is_relative_to(path.resolve())  # earlier predictions below the inputs
        files = [
            each for each in _files_of(path, recursive) if not (own and each.resolve().is_relative_to(output.resolve()))
        ]
        if not files:
            deeper = "" if recursive else "; --recursive looks into the folders below"
            raise InputError(f"{entry}: holds no pictures or videos{deeper}")
        return [(each, each.relative_to(path).with_suffix("").as_posix()) for each in files]
    if path.is_file():
        return [(path, path.stem)]
    matches = sorted(glob.iglob(str(path), recursive=True)) if glob.has_magic(entry) else []  # noqa: PTH207  absolute ones too
    files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        what = "no file matches this pattern" if glob.has_magic(entry) else "no such file or folder"
        raise InputError(f"{entry}: {what}")
    return [(each, each.stem) for each in files]


def _files_of(folder: Path, recursive: bool) -> list[Path]:
    """Returns the pictures and videos of a folder, by their endings, sorted; hidden ones are left out."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    shown = (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(path for path in shown if path.suffix.lower() in ENDINGS | video.ENDINGS and path.is_file())


def _free_name(name: str, suffix: str, taken: set[str]) -> str:
    longer = f"{name}_{suffix.lower().lstrip('.')}"
    candidates = [name, longer, *(f"{longer}_{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate.lower() not in taken)


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a list of inputs ({first_line(error)})") from error
    return [line.strip() for line in lines if line.strip()]
