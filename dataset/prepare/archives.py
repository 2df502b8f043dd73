"""Downloads as one stream of files: folders, zip and tar archives, and archives inside them; nothing is unpacked blindly."""

from __future__ import annotations

import errno
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from utils.errors import InputError, first_line

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
OTHER_ARCHIVES = (".rar", ".7z", ".z01", ".001", ".gz", ".xz", ".bz2", ".zst")
MAX_DEPTH = 3  # of archives in archives
MAX_HEADER_BYTES = 1 << 20  # of a tar's long names, which are read into memory
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, struct.error)
# An encrypted member, a compression that Python lacks (zips of other makers), a name that is no text.
UNSUPPORTED = (RuntimeError, UnicodeDecodeError)


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Args:
        path: folders, archives among them, that lead to it, and its name.
        size: in bytes.
        open: returns its content; only until the next entry is asked for.
        file: where it lies if it is a plain file; None in an archive.
    """

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]
    file: Path | None = None


class Sources:
    """Folders, archives and single files, walked as often as needed.

    Args:
        paths: of the sources.
        scratch: folder for archives that lie in archives; made when needed, removed by the caller.
        max_bytes: what the archives may hold, unpacked.
        max_files: how many files.

    Raises:
        InputError: while walking, for a damaged or unsupported archive, one that holds more than allowed, or a path that leads out
            of it.
    """

    def __init__(self, paths: Sequence[Path], scratch: Path, max_bytes: float, max_files: int) -> None:
        self.paths = paths
        self.skipped: Counter[str] = Counter()
        self._scratch = scratch
        self._max_bytes, self._max_files = max_bytes, max_files
        self._inner: dict[PurePosixPath, Path] = {}
        self._bytes = self._files = 0

    def entries(self) -> Iterator[Entry]:
        """Yields every file, always in the same order; hidden ones, links in archives and macOS's own are left out."""
        self.skipped.clear()
        self._bytes = self._files = 0
        labels = Counter(archive_stem(path.name) if is_archive(path.name) else path.name for path in self.paths)
        if twice := [label for label, number in labels.items() if number > 1]:
            raise InputError(f"two sources are called {twice[0]}; rename one")
        for path in self.paths:
            if path.is_dir():
                # The name of one of several may say which split it is.
                yield from self._in_folder(path, PurePosixPath(path.name if len(self.paths) > 1 else ""))
            elif not path.is_file():
                raise InputError(f"{path}: no such file or folder")
            elif is_archive(path.name):
                yield from self._in_archive(path, PurePosixPath(archive_stem(path.name)), path.name, 1)
            elif is_archive(path.name, OTHER_ARCHIVES):
                raise InputError(f"{path}: only zip and tar are read; unpack it and give the folder")
            else:
                yield Entry(PurePosixPath(path.name), path.stat().st_size, partial(_open_file, path), path)

    def _in_folder(self, root: Path, label: PurePosixPath) -> Iterator[Entry]:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if _is_shown(name))
            for name in sorted(name for name in names if _is_shown(name)):
                path = Path(folder) / name
                inside = label / path.relative_to(root).as_posix()
                if not path.is_file():
                    self.skipped["links to nothing"] += 1
                elif is_archive(name):
                    yield from self._in_archive(path, inside.with_name(archive_stem(name)), str(path), 1)
                elif is_archive(name, OTHER_ARCHIVES):
                    raise InputError(f"{path}: only zip and tar are read; unpack it there and remove it")
                else:
                    yield Entry(inside, path.stat().st_size, partial(_open_file, path), path)

    def _in_archive(self, path: Path, label: PurePosixPath, shown: str, depth: int) -> Iterator[Entry]:
        """Yields what an archive holds; an archive in it is copied out first, since it must be read back and forth."""
        if depth > MAX_DEPTH:
            raise InputError(f"{shown}: archives lie {depth} deep in each other; unpack it and give the folder")
        walk = _in_zip if is_archive(path.name, ZIP_SUFFIXES) else _in_tar
        seen: set[PurePosixPath] = set()
        with reading(shown):
            for name, size, open_member in walk(path):
                inside = safe_path(name, shown)
                if inside in seen:
                    raise InputError(f"{shown}: holds {inside} twice; unpack it yourself and give the folder")
                seen.add(inside)
                if not all(_is_shown(part) for part in inside.parts):
                    continue
                if open_member is None:
                    self.skipped["links in archives"] += 1
                    continue
                self._count(size, shown)
                if is_archive(inside.name):
                    inner = self._copy_out(label / inside, size, open_member)
                    shown_inner = f"{shown}/{inside}"
                    yield from self._in_archive(
                        inner, label / inside.with_name(archive_stem(inside.name)), shown_inner, depth + 1
                    )
                elif is_archive(inside.name, OTHER_ARCHIVES):
                    raise InputError(f"{shown}: {inside}: only zip and tar are read; unpack it and give the folder")
                else:
                    yield Entry(label / inside, size, open_member)

    def _count(self, size: int, shown: str) -> None:
        self._bytes += size
        self._files += 1
        for what, value, limit, flag in (
            ("gigabytes", self._bytes / 1e9, self._max_bytes / 1e9, "--max_gigabytes"),
            ("files", self._files, self._max_files, "--max_files"),
        ):
            if value > limit:
                raise InputError(f"{shown}: unpacks to more than {limit:g} {what}; if that is right, raise {flag}")

    def _copy_out(self, label: PurePosixPath, size: int, open_member: Callable[[], IO[bytes]]) -> Path:
        if label not in self._inner:
            self._scratch.mkdir(parents=True, exist_ok=True)
            target = self._scratch / f"{len(self._inner)}{''.join(label.suffixes[-2:])}"
            with open_member() as stream:
                write_stream(stream, size, target, str(label))
            self._inner[label] = target
        return self._inner[label]


def write_stream(stream: IO[bytes], size: int, target: Path, shown: str) -> None:
    """Writes a stream of a known size to a file.

    Raises:
        InputError: if it is shorter than that; it cannot be longer.
    """
    with target.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    if target.stat().st_size != size:
        raise InputError(f"{shown}: is {target.stat().st_size} bytes long instead of {size}; download it again")


def safe_path(name: str, shown: str) -> PurePosixPath:
    """Returns the path of an archive's member.

    Raises:
        InputError: if it is absolute or leads out of the archive.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise InputError(f"{shown}: holds {name!r}, which leads out of it; nothing was unpacked")
    return path


def is_archive(name: str, suffixes: Sequence[str] = ZIP_SUFFIXES + TAR_SUFFIXES) -> bool:
    """Returns whether a file is an archive by its ending."""
    return name.lower().endswith(tuple(suffixes))


def archive_stem(name: str) -> str:
    """Returns an archive's name without its ending."""
    suffix = max((each for each in ZIP_SUFFIXES + TAR_SUFFIXES if name.lower().endswith(each)), key=len)
    return name[: -len(suffix)] or name


@contextmanager
def reading(shown: str) -> Iterator[None]:
    """Turns what a damaged or foreign archive raises into an InputError that names it."""
    try:
        yield
    except UNSUPPORTED as error:
        reason = first_line(error)
        raise InputError(f"{shown}: cannot be read ({reason}); unpack it yourself and give the folder") from error
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's word, not the archive's
        raise InputError(f"{shown}: is damaged ({first_line(error)}); download it again") from error


Member = tuple[str, int, Callable[[], IO[bytes]] | None]


def _in_zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            yield info.filename, info.file_size, None if is_link else partial(archive.open, info)


class _Header(tarfile.TarInfo):
    """A tar's header whose long names and extensions may take a megabyte, not the machine's memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _in_tar(path: Path) -> Iterator[Member]:
    with tarfile.open(path, tarinfo=_Header) as archive:
        for member in archive:
            if not member.isdir():
                yield member.name, member.size, partial(_open_tar, archive, member) if member.isfile() else None
        # The checksum of what was compressed lies behind the last member.
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass


def _open_tar(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return stream


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
