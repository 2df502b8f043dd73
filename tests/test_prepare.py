"""Downloads in every wrapping to the layout that training reads, once and for all, and nothing outside of it."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.audit.listing import list_pairs
from dataset.codecs import Palette
from dataset.prepare import __main__ as prepare
from dataset.prepare.__main__ import PALETTE_FILE_NAME, RECORD_FILE_NAME, main
from dataset.prepare.coco import colours_for, draw, parse_coco
from dataset.prepare.downloads import KINDS, split_of
from dataset.trans10k import LAYOUTS, layout_of, scan
from dataset.transforms import read_label
from tests.conftest import ROOT, environment, write_pair, write_trans10k
from utils.errors import InputError

Pack = Callable[[Path, Path], Path]


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive.with_suffix(".zip"), "w") as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder).as_posix())
    return archive.with_suffix(".zip")


def tarred(mode: str) -> Pack:
    def pack(folder: Path, archive: Path) -> Path:
        path = archive.with_name(f"{archive.name}.tar.{mode}" if mode else f"{archive.name}.tar")
        with tarfile.open(path, f"w:{mode}") as out:  # type: ignore[call-overload]
            out.add(folder, ".")
        return path

    return pack


def nested(folder: Path, archive: Path) -> Path:
    """A zip of a zip for each split, as the download is."""
    with zipfile.ZipFile(archive.with_suffix(".zip"), "w") as out:
        for split in sorted(folder.iterdir()):
            inner = zipped(split, archive.with_name(split.name))
            out.write(inner, f"Trans10K/{split.name}.zip")
            inner.unlink()
    return archive.with_suffix(".zip")


def folder_itself(folder: Path, archive: Path) -> Path:
    return folder


def files(root: Path) -> dict[str, str]:
    """Returns the content of every file but the record."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != RECORD_FILE_NAME
    }


def times(root: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_plain(root: Path, counts: dict[str, int], images: str = "image", masks: str = "mask") -> Path:
    """Writes a data set as GDD and GSD have it: equal stems, {train,test}/{image,mask}."""
    for split, count in counts.items():
        for number in range(count):
            write_pair(root / split, f"{split}{number}", number)
    for folder in [root / split for split in counts]:
        for path in (folder / "masks").iterdir():
            path.rename(path.with_name(path.name.replace("_mask", "")))
        (folder / "images").rename(folder / images)
        (folder / "masks").rename(folder / masks)
    return root


# Wrappings


@pytest.mark.parametrize("pack", [zipped, tarred(""), tarred("gz"), tarred("xz"), nested, folder_itself])
def test_every_wrapping_gives_the_same_folder(
    pack: Pack, trans10k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = pack(trans10k, tmp_path / "Trans10K"), tmp_path / "out"
    assert run(source, out, "--expect", "none") == 0
    assert files(out) == files(trans10k)
    assert len(scan("trans10k", out, "test").pairs) == 10
    said = capsys.readouterr().out
    assert "trans10k, to be read as dataset_name: trans10k" in said
    assert f"next: python -m dataset.audit {out} --dataset_name trans10k" in said
    assert not list(tmp_path.glob(".*"))
    before = times(out)
    assert run(source, out, "--expect", "none") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert times(out) == before


def test_several_sources_make_one_data_set(trans10k: Path, tmp_path: Path) -> None:
    archives = [zipped(trans10k / split, tmp_path / split) for split in ("train", "validation", "test")]
    assert run(*archives, tmp_path / "out", "--expect", "none") == 0
    assert files(tmp_path / "out") == files(trans10k)


def test_equal_names_in_several_folders_are_not_mixed_up(tmp_path: Path) -> None:
    for number, folder in enumerate(("a/train", "b/test", "c/train")):
        write_pair(tmp_path / folder, "1", number)
    one, other, third = (tmp_path / folder for folder in ("a/train", "b/test", "c/train"))
    assert run(one, other, tmp_path / "out", "--expect", "none", "--kind", "folder", "--validation_share", "0") == 0
    for source, split in ((one, "train"), (other, "test")):
        assert (tmp_path / "out" / split / "images/1.jpg").read_bytes() == (source / "images/1.jpg").read_bytes()
    assert "two sources are called train" in refused(one, third, tmp_path / "none")


def test_a_part_of_trans10k_is_laid_out_too(trans10k: Path, tmp_path: Path) -> None:
    archive = zipped(trans10k / "train", tmp_path / "train")
    assert run(archive, tmp_path / "out", "--kind", "trans10k", "--expect", "none") == 0
    assert len(scan("trans10k", tmp_path / "out", "train").pairs) == 6


def test_a_folder_of_archives_is_a_source(trans10k: Path, tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    for split in ("train", "validation", "test"):
        zipped(trans10k / split, tmp_path / "download" / split)
    assert run(tmp_path / "download", tmp_path / "out", "--expect", "none") == 0
    assert files(tmp_path / "out") == files(trans10k)


def test_endings_may_be_upper_case_and_foreign_files_stay_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_trans10k(tmp_path / "data", 1, 1, 1)
    image = source / "train/images/0.jpg"
    image.rename(image.with_suffix(".JPG"))
    for name in (
        "__MACOSX/train/images/._0.jpg",
        "train/images/.hidden.jpg",
        "train/images/Thumbs.db",
        "train/edge/0.png",
    ):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert run(zipped(source, tmp_path / "T"), tmp_path / "out", "--expect", "none") == 0
    assert sorted(path.name for path in (tmp_path / "out/train").rglob("*.*")) == ["0.jpg", "0_mask.png"]
    said = capsys.readouterr().out
    assert "1 files in T/train/images" in said
    assert "1 files in T/train/edge" in said


def test_the_second_version_of_trans10k_is_recognised(tmp_path: Path) -> None:
    source = tmp_path / "data/Trans10K_cls12"
    for split in ("train", "validation", "test"):
        write_pair(source / split, "1", 1, 11)
        (source / split / "masks").rename(source / split / "masks_12")
    assert run(zipped(source.parent, tmp_path / "v2"), tmp_path / "out", "--expect", "none") == 0
    assert files(tmp_path / "out") == files(source)
    assert len(list_pairs(tmp_path / "out", "trans10k_v2", LAYOUTS["trans10k_v2"]).pairs) == 3


# Counts


def test_published_counts_are_checked(trans10k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = zipped(trans10k, tmp_path / "T")
    assert run(archive, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "train: 6 pairs, published are 5,000: the download is not whole" in said
    assert "test: 10 pairs, published are 4,428" in said
    assert "validation easy" in said


def test_whole_downloads_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trans10k: Path) -> None:
    whole = prepare.KINDS["trans10k"].__class__("trans10k", expected={"train": 6, "validation": 6, "test": 10})
    monkeypatch.setitem(prepare.KINDS, "trans10k", whole)
    assert run(trans10k, tmp_path / "out") == 0
    assert {kind: sum(each.expected.values()) for kind, each in KINDS.items() if each.expected} == {
        "trans10k": 22,
        "trans10k_v2": 10428,
        "gdd": 3916,
        "gsd": 4012,
    }


def test_a_picture_without_mask_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_plain(tmp_path / "GDD", {"train": 4, "test": 2})
    (source / "train/mask/train1.png").unlink()
    assert run(source, tmp_path / "out", "--kind", "folder") == 1
    assert "do not pair up" in capsys.readouterr().out


# Splits


def test_gdd_gets_a_validation_split_by_a_hash_of_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare.KINDS["gdd"].__class__("folder", expected={"train": 60, "test": 5})
    monkeypatch.setitem(prepare.KINDS, "gdd", whole)
    source = write_plain(tmp_path / "data", {"train": 60, "test": 5})
    out = tmp_path / "out"
    assert run(zipped(source, tmp_path / "GDD"), out) == 0
    assert "train: 60 pairs, as published" in capsys.readouterr().out
    held_out = {pair.name for pair in scan("folder", out, "validation").pairs}
    trained = {pair.name for pair in scan("folder", out, "train").pairs}
    assert 1 <= len(held_out) <= 14
    assert held_out | trained == {f"train{number}" for number in range(60)}
    assert not held_out & trained
    assert len(scan("folder", out, "test").pairs) == 5
    # Fewer pictures leave the others where they are.
    for number in range(30):
        (source / f"train/image/train{number}.jpg").unlink()
        (source / f"train/mask/train{number}.png").unlink()
    run(source, tmp_path / "fewer", "--kind", "folder")
    kept = {pair.name for pair in scan("folder", tmp_path / "fewer", "validation").pairs}
    assert kept == {name for name in held_out if int(name.removeprefix("train")) >= 30}


def test_gdd_and_gsd_are_told_apart_by_name_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_plain(tmp_path / "data", {"train": 2, "test": 1})
    assert "--kind gdd, --kind gsd" in refused(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(zipped(source, tmp_path / "GSD"), tmp_path / "out", "--expect", "none") == 0
    assert capsys.readouterr().out.startswith("gsd")


def test_pictures_without_splits_are_spread_over_all_three(tmp_path: Path) -> None:
    for number in range(80):
        write_pair(tmp_path / "mine", f"p{number}", number)
    flags = ("--validation_share", "0.2", "--test_share", "0.3")
    assert run(tmp_path / "mine", tmp_path / "out", *flags) == 0
    counts = [len(scan("folder", tmp_path / "out", split).pairs) for split in ("train", "validation", "test")]
    assert sum(counts) == 80
    assert 20 <= counts[0] <= 60
    assert min(counts) >= 6


def test_a_name_tells_its_split() -> None:
    for parts, split in (
        (("Trans10K", "train", "images"), "train"),
        (("coco", "val2017"), "validation"),
        (("instances_val2017",), "validation"),
        (("train", "test", "images"), "test"),
        (("glass_train_test", "valid"), "validation"),
        (("latest", "contest"), ""),
    ):
        assert split_of(parts) == split


# What is refused


@pytest.mark.parametrize(
    "name", ["../train/images/a.jpg", "/train/images/a.jpg", "x\\..\\..\\a.jpg", "C:/images/a.jpg"]
)
def test_a_path_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("train/images/a.jpg", b"x")
        archive.writestr(name, b"x")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    before = sorted(tmp_path.rglob("*"))
    for archive_name in ("evil.zip", "evil.tar"):
        assert "leads out of it" in refused(tmp_path / archive_name, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_archives_are_left_aside(trans10k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = tarred("")(trans10k, tmp_path / "T")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"train/images/link{kind!r}.jpg")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
    zip_path = zipped(trans10k, tmp_path / "T")
    with zipfile.ZipFile(zip_path, "a") as out:
        info = zipfile.ZipInfo("train/images/link.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(info, str(secret))
    for number, archive_path in enumerate((path, zip_path)):
        assert run(archive_path, tmp_path / str(number), "--expect", "none") == 0
        assert files(tmp_path / str(number)) == files(trans10k)
        assert "links in archives" in capsys.readouterr().out


def test_a_bomb_is_refused_and_the_flag_lets_it_pass(trans10k: Path, tmp_path: Path) -> None:
    archive = zipped(trans10k, tmp_path / "T")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as out:
        out.writestr("train/images/zeros.bin", bytes(20_000_000))
    assert archive.stat().st_size < 1_000_000
    message = refused(archive, tmp_path / "out", "--max_gigabytes", "0.01", "--expect", "none")
    assert "raise --max_gigabytes" in message
    assert "raise --max_files" in refused(archive, tmp_path / "out", "--max_files", "5", "--expect", "none")
    assert not (tmp_path / "out").exists()
    assert run(archive, tmp_path / "out", "--max_gigabytes", "0.03", "--expect", "none") == 0


def test_damaged_and_foreign_archives_are_named(trans10k: Path, tmp_path: Path) -> None:
    whole = tarred("gz")(trans10k, tmp_path / "T")
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:-2000])
    (tmp_path / "text.zip").write_text("<html>quota exceeded</html>")
    for name in ("cut.tar.gz", "text.zip"):
        message = refused(tmp_path / name, tmp_path / "out")
        assert name in message
        assert "download it again" in message
    (tmp_path / "T.rar").write_bytes(b"Rar!")
    assert "only zip and tar are read" in refused(tmp_path / "T.rar", tmp_path / "out")
    assert "no such file" in refused(tmp_path / "nowhere.zip", tmp_path / "out")
    archive = zipped(trans10k, tmp_path / "flipped")
    data = bytearray(archive.read_bytes())
    place = data.index(b"\xff\xd8\xff") + 40
    data[place] ^= 255
    archive.write_bytes(data)
    assert "is damaged" in refused(archive, tmp_path / "out", "--expect", "none")
    # What was whole stays; the repaired archive goes on from there.
    assert json.loads((tmp_path / "out" / RECORD_FILE_NAME).read_text())["finished"] is False
    data[place] ^= 255
    archive.write_bytes(data)
    assert run(archive, tmp_path / "out", "--expect", "none") == 0
    assert files(tmp_path / "out") == files(trans10k)


def test_an_interrupted_run_goes_on(trans10k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def fail_at_the_fifth(stream: Any, size: int, target: Path, shown: str) -> None:
        written.append(target)
        target.write_bytes(stream.read()[: None if len(written) < 5 else 10])
        if len(written) == 5:
            raise KeyboardInterrupt

    archive = nested(trans10k, tmp_path / "T")
    monkeypatch.setattr(prepare, "write_stream", fail_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run(archive, tmp_path / "out", "--expect", "none")
    assert not (tmp_path / ".out.unpacking").exists()
    monkeypatch.undo()
    assert run(archive, tmp_path / "out", "--expect", "none") == 0
    assert files(tmp_path / "out") == files(trans10k)


def test_a_folder_that_is_not_its_own_is_refused(trans10k: Path, tmp_path: Path) -> None:
    archive = zipped(trans10k, tmp_path / "T")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years")
    assert "did not write" in refused(archive, tmp_path / "full")
    run(archive, tmp_path / "out", "--expect", "none")
    assert "kind auto instead of trans10k" in refused(archive, tmp_path / "out", "--kind", "trans10k")
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr("train/images/new.jpg", b"x")
    assert "were others" in refused(archive, tmp_path / "out", "--expect", "none")
    inside = tmp_path / "source"
    write_trans10k(inside, 1, 1, 1)
    assert "stays as it is" in refused(inside, inside / "out")


def test_two_files_for_one_place_are_named(tmp_path: Path) -> None:
    for folder, size in (("a", (40, 36)), ("b", (50, 36))):
        write_pair(tmp_path / "mine" / folder / "train", "1", 1, size=size)
    assert "both would become train/images/1.jpg" in refused(tmp_path / "mine", tmp_path / "out")


def test_sources_that_hold_nothing_are_described(tmp_path: Path) -> None:
    (tmp_path / "mine/photos").mkdir(parents=True)
    (tmp_path / "mine/photos/a.jpg").write_bytes(b"x")
    assert "1 files in photos" in refused(tmp_path / "mine", tmp_path / "out")
    assert "no COCO annotations" in refused(tmp_path / "mine", tmp_path / "out", "--kind", "coco")
    assert "validation_share" in refused(tmp_path / "mine", tmp_path / "out", "--validation_share", "1")


def test_the_command_ends_with_2_after_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dataset.prepare", str(tmp_path / "nowhere.zip"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_changed_byte_is_noticed(trans10k: Path, tmp_path: Path) -> None:
    archive = tarred("gz")(trans10k, tmp_path / "Trans10K")
    data = bytearray(archive.read_bytes())
    data[-6] ^= 1  # of the checksum, behind the last member
    archive.write_bytes(data)
    assert "is damaged" in refused(archive, tmp_path / "out")


def test_one_name_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("train/images/1.jpg", b"one")
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("train/images/1.jpg", b"two")
    assert "holds train/images/1.jpg twice" in refused(tmp_path / "a.zip", tmp_path / "out")


def test_what_an_archive_claims_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "names.tar", "w", format=tarfile.GNU_FORMAT) as out:
        out.addfile(tarfile.TarInfo("train/images/1.jpg"))
        out.addfile(tarfile.TarInfo("train/images/" + "x" * (1 << 21)))
    assert "a header of 2097" in refused(tmp_path / "names.tar", tmp_path / "out")
    write_plain(tmp_path / "mine", {"train": 3})
    (tmp_path / "mine" / "notes.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    monkeypatch.setattr("dataset.prepare.downloads.MAX_JSON_BYTES", 10)
    assert run(tmp_path / "mine", tmp_path / "out", "--kind", "folder", "--validation_share", 0) == 0
    assert "notes.json (larger than" in capsys.readouterr().out


def test_long_names_and_limits_that_are_none(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "mine", {"train": 1})
    name = "x" * 250
    for kind, suffix in (("image", ".jpg"), ("mask", ".png")):
        next((source / "train" / kind).iterdir()).rename(source / "train" / kind / f"{name}{suffix}")
    assert run(source, tmp_path / "out", "--kind", "folder", "--validation_share", 0) == 0
    assert (tmp_path / f"out/train/images/{name}.jpg").is_file()
    for value in ("nan", "0", "-1"):
        assert (
            refused(source, tmp_path / "other", "--max_gigabytes", value)
            == f"--max_gigabytes {float(value)}: must be more than 0"
        )


# COCO


def square(left: float, top: float, side: float) -> list[float]:
    return [left, top, left + side, top, left + side, top + side, left, top + side]


def coco(
    shapes: list[tuple[int, Any]], size: tuple[int, int] = (8, 6), categories: tuple[str, ...] = ("cup", "pane")
) -> dict[str, Any]:
    """A file of one picture, 1.jpg, with shapes (category, segmentation)."""
    return {
        "images": [{"id": 7, "file_name": "1.jpg", "width": size[0], "height": size[1]}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, 1)],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": category, "segmentation": shape, "area": 100 - number}
            for number, (category, shape) in enumerate(shapes)
        ],
    }


def drawn(*shapes: tuple[int, Any]) -> np.ndarray:
    parsed = parse_coco(PurePosixPath("a.json"), coco(list(shapes)))
    return draw(parsed.images[0], {"cup": 1, "pane": 2})


def test_a_polygon_covers_the_pixels_whose_centre_it_holds() -> None:
    label = drawn((1, [square(1, 2, 3)]))
    expected = np.zeros((6, 8), np.uint8)
    expected[2:5, 1:4] = 1
    assert np.array_equal(label, expected)
    expected = np.zeros((6, 8), np.uint8)
    expected[2:4, 1:3] = 1  # centres from 2.4 to 4.4, and from 1.4 to 3.4
    assert np.array_equal(drawn((1, [square(1.4, 2.4, 2)])), expected)
    triangle = drawn((1, [[0, 0, 4, 0, 0, 4]]))  # centres with x + y < 4
    assert triangle.sum() == 6
    assert [int(row.sum()) for row in triangle] == [3, 2, 1, 0, 0, 0]
    assert drawn((1, [square(-5, -5, 100)])).all()
    assert not drawn((1, [square(20, 20, 5)])).any()


def test_polygons_add_up_and_later_smaller_shapes_lie_on_top() -> None:
    label = drawn((1, [square(0, 0, 2), square(4, 0, 2)]), (2, [square(1, 0, 1)]))
    assert label[0].tolist() == [1, 2, 0, 0, 1, 1, 0, 0]


def test_run_lengths_go_down_the_columns_plain_and_packed() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:5] = 1
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    assert np.array_equal(drawn((1, {"size": [6, 8], "counts": runs})), mask)
    # 13 and 3 as they are, then 3, 3, ... as differences to the run before the last, five bits a character.
    packed = "".join(
        chr(48 + (value & 31 if -16 <= value < 16 else value))
        for value in [runs[0], *runs[1:3], *(run - before for run, before in zip(runs[3:], runs[1:], strict=False))]
        if -16 <= value < 16
    )
    assert len(packed) == len(runs) - 1  # the last run is longer: two characters
    last = runs[-1] - runs[-3]
    packed += chr(48 + (last & 31 | 32)) + chr(48 + (last >> 5))
    assert np.array_equal(drawn((1, {"size": [6, 8], "counts": packed})), mask)


@pytest.mark.parametrize(
    "shape",
    [
        [[1, 2, 3]],
        [["a", "b", 1, 2]],
        {"size": [6, 8], "counts": [1, 2]},
        {"size": [8, 6], "counts": [48]},
        [[0, float("nan")]],
        [[0, 0, 10**400, 0, 4, 4]],
        {"size": [6, 8], "counts": [float("inf")]},
    ],
)
def test_a_malformed_shape_is_named(shape: Any) -> None:
    with pytest.raises(InputError, match=r"1\.jpg: a malformed shape"):
        drawn((1, shape))


def test_malformed_files_are_named() -> None:
    content = coco([(1, [square(0, 0, 2)])])
    for change in (
        {"images": [{"id": 7}]},
        {"annotations": [{"id": 3, "segmentation": [[1]], "image_id": 8, "category_id": 1}]},
    ):
        with pytest.raises(InputError, match=r"a\.json"):
            parse_coco(PurePosixPath("a.json"), {**content, **change})
    (picture,), (category, other) = content["images"], content["categories"]
    for change, told in (
        ({"images": [picture, {**picture, "file_name": "2.jpg"}]}, "images: id 7 occurs 2 times"),
        ({"images": [picture, {**picture, "id": 8}]}, r"images: file_name 1\.jpg occurs 2 times"),
        ({"categories": [category, {**other, "id": 1}]}, "categories: id 1 occurs 2 times"),
        ({"images": [{**picture, "width": float("inf")}]}, "is not a COCO file"),
    ):
        with pytest.raises(InputError, match=f"a.json: {told}"):
            parse_coco(PurePosixPath("a.json"), {**content, **change})
    with pytest.raises(InputError, match="is said to be"):
        parse_coco(PurePosixPath("a.json"), coco([], (10**6, 10**6)))


def write_coco(root: Path, split: str, number: int = 3) -> Path:
    """Writes a folder of pictures beside their annotations: two categories, one without shapes, a picture without any."""
    (root / split).mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 0, "name": "objects"}, {"id": 1, "name": "cup"}, {"id": 2, "name": "pane"}]
    for index in range(number):
        Image.new("RGB", (20, 16), (index, 0, 0)).save(root / split / f"{split}{index}.jpg")
        content["images"].append({"id": index, "file_name": f"{split}{index}.jpg", "width": 20, "height": 16})
        if index:
            shape = [square(index % 14, 2, 6)]
            content["annotations"].append(
                {"id": index, "image_id": index, "category_id": 1 + index % 2, "segmentation": shape}
            )
    content["annotations"].append({"id": 99, "image_id": 0, "category_id": 1, "segmentation": [], "bbox": [0, 0, 2, 2]})
    (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_coco_becomes_a_folder_with_a_palette(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid", "test"):
        write_coco(tmp_path / "export", split)
    out = tmp_path / "out"
    assert run(zipped(tmp_path / "export", tmp_path / "export"), out) == 0
    said = capsys.readouterr().out
    assert "left aside: 3 annotations without a shape" in said
    assert "files in" not in said
    assert "validation is" not in said  # the download has its own
    palette = Palette.from_file(out / PALETTE_FILE_NAME)
    assert palette.names == ("background", "cup", "pane")
    layout = layout_of("folder", out / PALETTE_FILE_NAME)
    (zero, one, two) = scan("folder", out, "validation").pairs
    assert not read_label(zero.mask_path, layout.read_label).any()
    label = read_label(one.mask_path, layout.read_label)
    assert np.array_equal(np.argwhere(label == 2).min(axis=0), (2, 1))
    assert (label == 2).sum() == 36
    assert (read_label(two.mask_path, layout.read_label) == 1).sum() == 36
    before = times(out)
    assert run(tmp_path / "export.zip", out) == 0
    assert times(out) == before


def test_boxes_alone_make_no_mask(tmp_path: Path) -> None:
    write_coco(tmp_path / "export", "train", 1)
    for flags in ((), ("--binary",)):
        assert "boxes alone make no mask" in refused(tmp_path / "export", tmp_path / "out", *flags)


def test_categories_are_chosen_or_merged(tmp_path: Path) -> None:
    write_coco(tmp_path / "export", "train", 40)
    source = tmp_path / "export"
    run(source, tmp_path / "one", "--categories", "cup", "--validation_share", "0")
    run(source, tmp_path / "merged", "--binary", "--validation_share", "0")
    for out, expected in (("one", {0: 21, 1: 19}), ("merged", {0: 1, 1: 39})):
        assert not (tmp_path / out / PALETTE_FILE_NAME).exists()
        pairs = scan("folder", tmp_path / out, "train").pairs
        labels = [read_label(pair.mask_path, LAYOUTS["folder"].read_label) for pair in pairs]
        filled = sum(bool(label.any()) for label in labels)
        assert {0: len(labels) - filled, 1: filled} == expected
    assert "the annotations have cup, pane" in refused(source, tmp_path / "none", "--categories", "mug")


def test_annotations_and_pictures_may_lie_apart(tmp_path: Path) -> None:
    write_coco(tmp_path / "export", "train")
    annotations = tmp_path / "instances.json"
    (tmp_path / "export/train/_annotations.coco.json").rename(annotations)
    assert "no such file in the sources" in refused(annotations, tmp_path / "out")
    assert (
        run(tmp_path / "export/train", annotations, tmp_path / "out", "--validation_share", "0", "--test_share", "0")
        == 0
    )
    assert len(scan("folder", tmp_path / "out", "train").pairs) == 3


def test_names_in_annotations_lead_nowhere_else(tmp_path: Path) -> None:
    source = tmp_path / "export"
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(source / folder / "1.jpg")
    content = coco([(1, [square(0, 0, 2)])])
    content["images"] = [
        {"id": number, "file_name": name, "width": 8, "height": 6}
        for number, name in ((7, "/home/somebody/a/1.jpg"), (8, "../b/1.jpg"))
    ]
    (source / "all.json").write_text(json.dumps(content))
    assert "2 files of that name" in refused(source, tmp_path / "out")
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "a/1.jpg", "b/1.jpg"
    (source / "all.json").write_text(json.dumps(content))
    run(source, tmp_path / "out", "--validation_share", "0", "--test_share", "0")
    assert sorted(path.name for path in (tmp_path / "out/train/images").iterdir()) == ["a_1.jpg", "b_1.jpg"]


def test_colours_stay_apart_and_run_out() -> None:
    for number in (2, 5, 11):
        palette = colours_for([f"class {index}" for index in range(number)])
        assert len(palette.names) == number + 1
    with pytest.raises(InputError, match="--binary"):
        colours_for([f"class {index}" for index in range(40)])
