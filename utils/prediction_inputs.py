"""What a user names to be predicted (files, folders, patterns, lists), and the names that its outputs get."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.pictures import ENDINGS
from utils import video
from utils.errors import InputError, first_line

MAX_STEM_BYTES = 200  # file systems take 255


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


def find_files(
    inputs: Sequence[str],
    lists: Sequence[Path],
    recursive: bool,
    output: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> list[tuple[Path, str]]:
    """Returns the files that inputs name, each once, with the name that its place gives it.

    A folder's pictures keep their place below it; another file is named after itself.

    Args:
        inputs: files, folders and patterns (`photos/**/*.jpg`).
        lists: files with one input a line.
        recursive: whether folders are searched to the bottom.
        output: folder whose files are no inputs.
        tell: gets a sentence for each folder where something was left out.

    Raises:
        InputError: naming an input (a line of a list may be gone) that is nothing, or a folder that is empty or cannot be read.
    """
    listed = [line for path in lists for line in _read_list(path)]
    if not inputs and not listed:
        raise InputError("nothing to predict; name files, folders or patterns, or --list FILE")
    found: dict[str, tuple[Path, str]] = {}
    for number, entry in enumerate([*inputs, *listed]):
        try:
            expanded = _expand(entry, recursive, output, tell, number >= len(inputs))
        except OSError as error:
            raise InputError(f"{error.filename or entry}: cannot be read ({error.strerror})") from error
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


def _expand(
    entry: str, recursive: bool, output: Path, tell: Callable[[str], None], is_listed: bool
) -> Iterable[tuple[Path, str]]:
    """Returns what an entry names; a line of a list that names nothing stands for a file that cannot be read."""
    path = Path(entry).expanduser()
    if path.is_dir():
        if path.resolve() == output.resolve():
            raise InputError(f"--output {output}: holds the inputs; name a folder of its own for the predictions")
        files, left_out = _files_of(path, recursive, output.resolve())
        if left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
            tell(f"{entry}: left out what is no picture or video: {kinds}")
        if not files:
            deeper = "" if recursive else "; --recursive looks into the folders below"
            raise InputError(f"{entry}: holds no pictures or videos{deeper}")
        return [(each, each.relative_to(path).with_suffix("").as_posix()) for each in files]
    if path.is_file():
        return [(path, path.stem)]
    matches = sorted(glob.iglob(str(path), recursive=True)) if glob.has_magic(entry) else []  # noqa: PTH207  absolute ones too
    own = output.resolve()
    files = [path for match in matches if (path := Path(match)).is_file() and own not in path.resolve().parents]
    if not files and is_listed and not path.exists():
        return [(path, path.stem)]
    if not files:
        what = "no file matches this pattern" if glob.has_magic(entry) else "no such file or folder"
        what = "is neither a file nor a folder" if path.exists() else what
        raise InputError(f"{entry}: {what}")
    return [(each, each.stem) for each in files]


def _files_of(folder: Path, recursive: bool, output: Path) -> tuple[list[Path], Counter[str]]:
    """Returns the pictures and videos of a folder, sorted, and the endings of what else lies there; hidden ones are passed over.

    Args:
        folder: to look into.
        recursive: whether to look below; links to folders are not followed.
        output: resolved; earlier predictions below the inputs are none.

    Raises:
        OSError: naming a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=fail):
        shown = [Path(place) / name for name in (*folders, *names) if not name.startswith(".")]
        folders[:] = [path.name for path in shown if recursive and path.is_dir() and path.resolve() != output]
        for path in shown:
            if path.is_dir():
                left_out["linked folders"] += recursive and path.is_symlink()
            elif path.suffix.lower() not in ENDINGS | video.ENDINGS:
                left_out[path.suffix.lower() or "without ending"] += 1
            elif path.is_file():
                found.append(path)
            else:
                left_out["broken links or special files"] += 1
    return sorted(found), +left_out


def _free_name(name: str, suffix: str, taken: set[str]) -> str:
    folder, _, stem = name.rpartition("/")
    if len(os.fsencode(stem)) > MAX_STEM_BYTES:  # what the outputs' names add would not fit
        stem = os.fsencode(stem)[:MAX_STEM_BYTES].decode(errors="ignore")
        name = f"{folder}/{stem}" if folder else stem
    longer = f"{name}_{suffix.lower().lstrip('.')}"
    candidates = [name, longer, *(f"{longer}_{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate.lower() not in taken)


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a list of inputs ({first_line(error)})") from error
    return [line.strip() for line in lines if line.strip()]
