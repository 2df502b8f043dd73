"""A folder with each fault: every one is found and nothing else, and the corrected copy is clean and trains."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dataset.audit import contact_sheet, repair
from dataset.audit.__main__ import AUDIT_FILE_NAME, count, main, run_audit
from dataset.audit.contact_sheet import SHEET_FILE_NAME
from dataset.audit.duplicates import Fingerprint, Twin, find_twins, fingerprint
from dataset.audit.inspection import SUPPORT, Inspection, MaskRepair, inspect_pair
from dataset.audit.listing import list_pairs
from dataset.audit.mask_values import UnclearMaskError, snapped, soft_edges
from dataset.audit.repair import RECORD_FILE_NAME
from dataset.audit.turns import EXIF_TURNS, QUARTERS, evidence
from dataset.render_glass import SPLITS
from dataset.trans10k import EXIF_ORIENTATION, LAYOUTS, layout_of, scan
from dataset.transforms import read_image, read_label
from tests.conftest import ROOT, Launch, environment
from utils.errors import InputError

Picture = NDArray[np.uint8]
NUMBERS = iter(range(1000, 10**9))
HOSTILE = "<script>alert(1)<!--&\"'"


def scene(number: int, size: tuple[int, int] = (96, 72)) -> tuple[Picture, Picture]:
    """A textured picture (H, W, 3) with an object of no symmetry, and the object's mask (H, W) of 0 and 255."""
    width, height = size
    rng = np.random.default_rng(number)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (height, width, 3)).astype(np.float32), (0, 0), 3)
    image = (image - image.mean()) * 6 + 90
    corners = np.array([(0.15, 0.1), (0.4, 0.1), (0.4, 0.55), (0.8, 0.6), (0.7, 0.85), (0.15, 0.8)])
    corners += rng.uniform(-0.05, 0.05, corners.shape)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(corners * size).astype(np.int32)], 255)
    image[mask > 0] += 90
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), mask


def write(
    root: Path,
    where: str,
    name: str,
    image: Picture | Image.Image | None = None,
    mask: Picture | Image.Image | None = None,
    size: tuple[int, int] = (96, 72),
    suffix: str = ".jpg",
    **options: object,
) -> tuple[Path, Path]:
    """Writes a pair; a new scene stands for what is not given."""
    made, drawn = scene(next(NUMBERS), size)
    image_path, mask_path = root / where / "images" / f"{name}{suffix}", root / where / "masks" / f"{name}_mask.png"
    for path, pixels in ((image_path, made if image is None else image), (mask_path, drawn if mask is None else mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        picture.save(path, **(options if path == image_path else {}))
    return image_path, mask_path


def clean(root: Path) -> Path:
    """Writes a data set in the Trans10k layout without a fault."""
    for number in range(2):
        write(root, "train", f"good{number}")
    for split in SPLITS[1:]:
        for difficulty in ("easy", "hard"):
            write(root, f"{split}/{difficulty}", "good")
    return root


def kinds(root: Path, dataset_name: str = "trans10k", palette: Path | None = None) -> dict[str, list[str]]:
    """Returns the files of each kind that an audit finds."""
    audit = run_audit(root, dataset_name, layout_of(dataset_name, palette))
    found: dict[str, list[str]] = {}
    for finding in audit.findings:
        found.setdefault(finding.kind, []).append(finding.file)
    return {kind: sorted(files) for kind, files in found.items()}


def digests(root: Path) -> dict[str, tuple[str, int]]:
    """Returns content and time of every file below a folder."""
    return {
        path.relative_to(root).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def fix(root: Path, out: Path, *flags: str) -> int:
    """Runs the command with --fix in this process."""
    return main([str(root), "--fix", str(out), "--out", str(out.with_name("audited")), "--workers", "1", *flags])


def refused(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        main([*arguments, "--workers", "1"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A folder with each fault


@dataclass(frozen=True)
class Case:
    """A fault: what writes it under a stem, the files of that stem that are found by kind, and whether it can be mended."""

    build: Callable[[Path, str], object]
    found: dict[str, list[str]]
    mended: bool


def jpeg_mask(root: Path, stem: str) -> None:
    path = write(root, "train", stem)[1]
    buffer = io.BytesIO()
    Image.open(path).save(buffer, format="JPEG", quality=60)
    Image.open(buffer).save(path)


def truncated(root: Path, stem: str, which: int) -> None:
    path = write(root, "train", stem)[which]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def exif_pair(root: Path, stem: str, mask_of_stored: bool) -> None:
    """A picture stored lying on its side, with the orientation that sets it upright, and a mask of one or the other."""
    image, mask = scene(next(NUMBERS))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    turned = Image.fromarray(image).transpose(Image.Transpose.ROTATE_90)
    stored_mask = Image.fromarray(mask).transpose(Image.Transpose.ROTATE_90)
    write(root, "train", stem, turned, stored_mask if mask_of_stored else mask, exif=exif)


def turned_pair(root: Path, stem: str, quarter: int, size: tuple[int, int] = (96, 72)) -> None:
    image, mask = scene(next(NUMBERS), size)
    write(root, "train", stem, image, np.rot90(mask, quarter).copy())


def leak(root: Path, stem: str, mirrored: bool = False) -> None:
    """The same picture in train and in test, there compressed less."""
    image, mask = scene(next(NUMBERS))
    write(root, "test/easy", f"{stem} in test", image, mask, quality=95)
    image, mask = (image[:, ::-1].copy(), mask[:, ::-1].copy()) if mirrored else (image, mask)
    write(root, "train", stem, image, mask, quality=60)


def linked(root: Path, stem: str) -> None:
    image, _ = write(root, "train", stem)
    outside = root.parent / "elsewhere.jpg"
    image.rename(outside)
    image.symlink_to(outside)


def alpha_mask(root: Path, stem: str) -> None:
    image, mask = scene(next(NUMBERS))
    write(root, "train", stem, image, np.dstack([np.zeros((*mask.shape, 3), np.uint8), mask]))


def two_of_a_stem(root: Path, stem: str) -> None:
    image, _ = write(root, "train", stem)
    Image.open(image).save(image.with_suffix(".png"))


def jpeg_for_png(root: Path, stem: str) -> None:
    path = write(root, "train", stem)[1]
    Image.open(path).save(path.with_suffix(".jpg"), quality=60)
    path.unlink()


def scaled_mask(root: Path, stem: str) -> None:
    image, mask = scene(next(NUMBERS))
    write(root, "train", stem, image, mask[::2, ::2].copy())


IMAGE, MASK = "train/images/{}.jpg", "train/masks/{}_mask.png"
CASES = {
    "void": Case(lambda root, stem: write(root, "train", stem)[0].write_bytes(b""), {"unreadable": [IMAGE]}, False),
    "text": Case(lambda root, stem: write(root, "train", stem)[1].write_text("a mask"), {"unreadable": [MASK]}, False),
    "cut picture": Case(lambda root, stem: truncated(root, stem, 0), {"unreadable": [IMAGE]}, False),
    "cut mask": Case(lambda root, stem: truncated(root, stem, 1), {"unreadable": [MASK]}, False),
    "bomb": Case(
        lambda root, stem: write(root, "train", stem, Image.new("1", (20_000, 10_000)), suffix=".png"),
        {"unreadable": ["train/images/{}.png"]},
        False,
    ),
    "no mask": Case(lambda root, stem: write(root, "train", stem)[1].unlink(), {"missing": [IMAGE]}, False),
    "no picture": Case(lambda root, stem: write(root, "train", stem)[0].unlink(), {"missing": [MASK]}, False),
    "another shape": Case(
        lambda root, stem: write(root, "train", stem, mask=scene(1, (50, 50))[1]), {"size": [MASK]}, False
    ),
    "another scale": Case(scaled_mask, {"size": [MASK]}, True),
    "by 90": Case(lambda root, stem: turned_pair(root, stem, 1), {"rotated": [MASK]}, True),
    "by 270": Case(lambda root, stem: turned_pair(root, stem, 3), {"rotated": [MASK]}, True),
    "by 180": Case(lambda root, stem: turned_pair(root, stem, 2), {"rotated": [MASK]}, True),
    "square by 90": Case(lambda root, stem: turned_pair(root, stem, 1, (96, 96)), {"rotated": [MASK]}, True),
    "exif stored": Case(lambda root, stem: exif_pair(root, stem, True), {"rotated": [MASK]}, True),
    "exif upright": Case(lambda root, stem: exif_pair(root, stem, False), {}, True),
    "jpeg noise": Case(jpeg_mask, {"values": [MASK]}, True),
    "grey": Case(lambda root, stem: write(root, "train", stem, mask=scene(7)[1] // 2), {"values": [MASK]}, False),
    "ones": Case(lambda root, stem: write(root, "train", stem, mask=scene(7)[1] // 255), {"values": [MASK]}, False),
    "alpha": Case(alpha_mask, {"values": [MASK]}, True),
    "nothing": Case(
        lambda root, stem: write(root, "train", stem, mask=np.zeros((72, 96), np.uint8)), {"empty": [MASK]}, True
    ),
    "all": Case(
        lambda root, stem: write(root, "train", stem, mask=np.full((72, 96), 255, np.uint8)), {"full": [MASK]}, True
    ),
    "dot": Case(lambda root, stem: write(root, "train", stem, size=(1, 1)), {"size": [IMAGE], "full": [MASK]}, False),
    "leak": Case(leak, {"leak_train_test": [IMAGE]}, False),
    "mirrored leak": Case(lambda root, stem: leak(root, stem, True), {"leak_train_test": [IMAGE]}, False),
    "link": Case(linked, {"link": [IMAGE]}, True),
    "stem": Case(
        two_of_a_stem,
        {"name": [IMAGE, "train/images/{}.png"], "duplicate": ["train/images/{}.png"]},
        False,
    ),
    "case": Case(
        lambda root, stem: [write(root, "train", name) for name in (stem, stem.title())], {"name": [IMAGE]}, True
    ),
    "Mask": Case(
        lambda root, stem: write(root, "train", stem)[1].rename(root / f"train/masks/{stem.lower()}_mask.png"),
        {"name": ["train/masks/mask_mask.png"]},
        True,
    ),
    "jpeg for png": Case(
        jpeg_for_png, {"name": ["train/masks/{}_mask.jpg"], "values": ["train/masks/{}_mask.jpg"]}, True
    ),
    "bmp": Case(lambda root, stem: write(root, "train", stem, suffix=".bmp"), {"name": ["train/images/{}.bmp"]}, True),
    "words": Case(
        lambda root, stem: (root / f"train/images/{stem}.txt").write_text("words"),
        {"ignored": ["train/images/{}.txt"]},
        False,
    ),
    HOSTILE: Case(lambda root, stem: turned_pair(root, stem, 1), {"rotated": [MASK]}, True),
}


@dataclass(frozen=True)
class Repaired:
    """A folder with every fault, its audit, and the corrected copy."""

    root: Path
    found: dict[str, list[str]]
    out: Path
    status: int
    before: dict[str, tuple[str, int]]
    audited: Path


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    folder = tmp_path_factory.mktemp("faulty")
    root = clean(folder / "data")
    for stem, case in CASES.items():
        case.build(root, stem)
    before = digests(root)
    status = fix(root, folder / "fixed")
    audited = folder / "audited"
    rows = json.loads((audited / AUDIT_FILE_NAME).read_text())["findings"]
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["kind"], []).append(row["file"])
    return Repaired(root, found, folder / "fixed", status, before, audited)


def test_every_fault_is_found_and_nothing_else(faulty: Repaired) -> None:
    expected: dict[str, list[str]] = {}
    for stem, case in CASES.items():
        for kind, files in case.found.items():
            expected.setdefault(kind, []).extend(file.format(stem) for file in files)
    assert {kind: sorted(files) for kind, files in faulty.found.items()} == {
        kind: sorted(files) for kind, files in expected.items()
    }
    assert faulty.status == 1


def test_the_original_stays_as_it_is(faulty: Repaired) -> None:
    assert digests(faulty.root) == faulty.before


def test_the_corrected_copy_is_clean_and_holds_what_could_be_mended(faulty: Repaired) -> None:
    assert set(kinds(faulty.out)) == {"empty", "full"}  # notes
    mended = {stem for stem, case in CASES.items() if case.mended} - {"case"} | {"Case", "case_2", "good0", "good1"}
    assert {pair.name for pair in scan("trans10k", faulty.out, "train").pairs} == mended
    assert len(scan("trans10k", faulty.out, "test").pairs) == 2 + 2
    record = json.loads((faulty.out / RECORD_FILE_NAME).read_text())
    assert record["finished"] is True
    lost = {stem for stem, case in CASES.items() if not case.mended} - {"words"}  # which is in no pair
    assert {Path(file).stem.removesuffix("_mask") for file in record["left_out"]} == lost
    assert all(record["left_out"].values())
    assert set(record["mended"]) >= {MASK.format(stem) for stem in ("by 90", "jpeg noise", "alpha", "another scale")}


def test_mended_masks_are_the_masks_that_were_meant(faulty: Repaired) -> None:
    """Each mask of the copy lies where its scene's object is bright: the object is 90 levels above its surroundings."""
    for pair in scan("trans10k", faulty.out, "train").pairs:
        if pair.name in ("nothing", "all"):
            continue
        image = read_image(pair.image_path).mean(axis=2)
        label = read_label(pair.mask_path, LAYOUTS["trans10k"].read_label)
        assert image[label == 1].mean() - image[label == 0].mean() > 70, pair.name
        rim = cv2.erode(label, np.ones((5, 5), np.uint8)) != cv2.dilate(label, np.ones((5, 5), np.uint8))
        threshold = (image[label == 1].mean() + image[label == 0].mean()) / 2
        assert ((image > threshold) == (label == 1))[~rim].mean() > 0.9, pair.name


def test_the_contact_sheet_shows_names_and_runs_nothing(faulty: Repaired) -> None:
    sheet = (faulty.audited / SHEET_FILE_NAME).read_text()
    assert "<script" not in sheet.lower()
    assert "&lt;script&gt;alert(1)&lt;!--&amp;" in sheet
    assert "default-src 'none'" in sheet
    assert not re.findall(r'(?:src|href)="(?!data:image/webp;base64,|#)', sheet)
    assert sheet.count(">repaired<") >= 8
    for kind in faulty.found:
        assert f'id="{kind}"' in sheet


def test_a_second_run_does_nothing_and_files_that_got_lost_come_back(
    faulty: Repaired, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(faulty.out)
    assert fix(faulty.root, faulty.out) == 1
    assert "nothing to do" in capsys.readouterr().out
    assert digests(faulty.out) == before
    lost = faulty.out / "train/masks/by 90_mask.png"
    lost.unlink()
    fix(faulty.root, faulty.out)
    assert {name: content for name, (content, _) in digests(faulty.out).items()} == {
        name: content for name, (content, _) in before.items()
    }


@pytest.mark.slow
def test_the_corrected_copy_trains(faulty: Repaired, launch: Launch, tmp_path: Path) -> None:
    flags: dict[str, object] = {
        "config": ROOT / "configs/tiny.yaml",
        "base_model_path": ROOT / "assets/tiny_sd3",
        "dataset_path": faulty.out,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "val_steps": "null",
        "latent_cache": "off",
        "save_checkpoint_steps": 2,
        "ema_decay": "null",
    }
    launch("trainer.py", flags)
    assert (tmp_path / "run/checkpoints/checkpoint-2").is_dir()


# The copy's folder


def small(folder: Path) -> Path:
    root = clean(folder / "data")
    turned_pair(root, "turned", 1)
    return root


def test_an_interrupted_copy_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = small(tmp_path), tmp_path / "fixed"
    copied = []

    def fail_at_the_fourth(source: Path, target: Path, hard_link: bool = False) -> None:
        copied.append(target)
        target.write_bytes(b"half")
        if len(copied) == 4:
            raise KeyboardInterrupt
        shutil.copyfile(source, target)

    monkeypatch.setattr(repair, "copy_file", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        fix(root, out)
    assert json.loads((out / RECORD_FILE_NAME).read_text())["finished"] is False
    monkeypatch.undo()
    assert fix(root, out) == 1
    assert not list(out.rglob("*.part"))
    assert set(kinds(out)) == set()
    assert len(scan("trans10k", out, "train").pairs) == 3


def test_a_folder_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    root = small(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years")
    assert "did not write" in refused(str(root), "--fix", str(full), "--out", str(tmp_path / "a"))
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    for inside in (root / "fixed", root, root.parent):
        message = refused(str(root), "--fix", str(inside), "--out", str(tmp_path.parent / f"{tmp_path.name}_a"))
        assert "name another folder" in message
    assert "--out" in refused(str(root), "--out", str(root / "audit"))
    fix(root, tmp_path / "fixed")
    other = clean(tmp_path / "other")
    assert "was made with source" in refused(str(other), "--fix", str(tmp_path / "fixed"), "--out", str(tmp_path / "a"))
    write(root, "train", "new")
    assert "were others" in refused(str(root), "--fix", str(tmp_path / "fixed"), "--out", str(tmp_path / "a"))


def test_hard_links_only_where_they_are_asked_for(tmp_path: Path) -> None:
    root = small(tmp_path)
    fix(root, tmp_path / "copied")
    fix(root, tmp_path / "linked", "--hard_links")
    for name, num_links in (("good0.jpg", 2), ("turned.jpg", 2)):
        assert (tmp_path / "copied/train/images" / name).stat().st_nlink == 1
        assert (tmp_path / "linked/train/images" / name).stat().st_nlink == num_links
    assert (tmp_path / "linked/train/masks/turned_mask.png").stat().st_nlink == 1


# Status, output, layouts


def test_a_clean_folder_ends_with_0_and_is_listed_as_training_lists_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = clean(tmp_path / "data")
    assert main([str(root), "--out", str(tmp_path / "audit"), "--workers", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "audit" / AUDIT_FILE_NAME).read_text())
    assert result["faults"] == 0
    counts = {(row["split"], row["difficulty"]): row for row in result["counts"]}
    train = counts["train", ""]
    assert (train["pictures"], train["masks"], train["pairs"], train["usable"]) == (2, 2, 2, 2)
    assert train["sizes"] == {"96x72": 2}
    listed = list_pairs(root, "trans10k", LAYOUTS["trans10k"])
    for split in SPLITS:
        expected = [(pair.difficulty, pair.image_path, pair.mask_path) for pair in scan("trans10k", root, split).pairs]
        assert [(pair.difficulty, pair.image, pair.mask) for pair in listed.pairs if pair.split == split] == expected
        for pair in listed.pairs:
            assert root / pair.target_image == pair.image
            assert root / pair.target_mask == pair.mask


def test_shares_of_classes_are_means_over_pairs(tmp_path: Path) -> None:
    root = tmp_path / "data"
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 85
    write(root, "train", "a", mask=half, size=(16, 16))
    write(root, "train", "b", mask=np.full((32, 32), 255, np.uint8), size=(32, 32))
    (row,) = count(run_audit(root, "trans10k_classes", LAYOUTS["trans10k_classes"]))
    assert row["share"] == {"background": 0.25, "things": 0.25, "stuff": 0.5}
    assert row["pictures_with"] == {"things": 1, "stuff": 1}


def test_the_command_ends_with_2_after_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dataset.audit", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_layout_is_named(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for split in SPLITS:
        write(flat, split, "a")
    assert "add --dataset_name folder" in refused(str(flat), "--out", str(tmp_path / "a"))
    published = clean(tmp_path / "published")
    assert "--dataset_name trans10k" in refused(
        str(published), "--dataset_name", "folder", "--out", str(tmp_path / "a")
    )
    second = tmp_path / "second"
    for path in write(second, "train", "a"):
        (path.parent.parent / "masks").rename(path.parent.parent / "masks_12") if "masks" in str(path) else None
    assert "add --dataset_name trans10k_v2" in refused(str(second), "--out", str(tmp_path / "a"))
    (tmp_path / "gdd/train/image").mkdir(parents=True)
    assert "dataset.prepare" in refused(str(tmp_path / "gdd"), "--out", str(tmp_path / "a"))
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips/Trans10K.zip").write_bytes(b"")
    assert "dataset.prepare" in refused(str(tmp_path / "zips"), "--out", str(tmp_path / "a"))
    assert str(flat) in refused(str(tmp_path), "--out", str(tmp_path.parent / f"{tmp_path.name}_a"))


def test_soft_masks_of_a_folder_are_found_and_mended(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, "train", "hard")
    image, mask = scene(3)
    write(root, "train", "soft", image, np.asarray(cv2.GaussianBlur(mask, (0, 0), 1)))
    numbered = np.arange(30, dtype=np.uint8).repeat(3)[:, None].repeat(96, axis=1)
    write(root, "train", "numbered", mask=numbered, size=(96, 90))
    assert kinds(root, "folder") == {"values": ["train/masks/soft_mask.png"]}
    fix(root, tmp_path / "fixed", "--dataset_name", "folder")
    assert kinds(tmp_path / "fixed", "folder") == {}
    mended = np.asarray(Image.open(tmp_path / "fixed/train/masks/soft_mask.png"))
    assert (mended != mask).mean() < 0.02
    assert set(np.unique(mended)) == {0, 255}


def test_colours_near_those_of_a_palette_are_mended(tmp_path: Path) -> None:
    palette = tmp_path / "palette.json"
    palette.write_text('{"background": [0, 0, 0], "cup": [255, 255, 0], "pane": [0, 255, 255]}')
    root = tmp_path / "data"
    image, mask = scene(4)
    colours = np.zeros((*mask.shape, 3), np.uint8)
    colours[mask > 0] = (255, 255, 0)
    colours[:10] = (0, 255, 255)
    write(root, "train", "exact", mask=colours)
    noisy = np.clip(colours + np.random.default_rng(0).integers(-9, 10, colours.shape), 0, 255).astype(np.uint8)
    write(root, "train", "near", image, noisy)
    write(root, "train", "far", mask=colours // 2 + np.uint8(60))
    found = kinds(root, "folder", palette)
    assert found == {"values": ["train/masks/far_mask.png", "train/masks/near_mask.png"]}
    fix(root, tmp_path / "fixed", "--dataset_name", "folder", "--palette", str(palette))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "fixed/train/masks/near_mask.png")), colours)
    assert not (tmp_path / "fixed/train/images/far.jpg").exists()


def test_numbers_of_classes_are_never_guessed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    _, mask = scene(5)
    for name, value in (("legal", 11), ("ignored", 255)):
        _, path = write(root, "train", name, mask=mask // 255 * np.uint8(value))
        (root / "train/masks_12").mkdir(exist_ok=True)
        path.rename(root / "train/masks_12" / path.name)
    assert kinds(root, "trans10k_v2") == {"values": ["train/masks_12/ignored_mask.png"]}
    fix(root, tmp_path / "fixed", "--dataset_name", "trans10k_v2")
    assert [path.name for path in (tmp_path / "fixed/train/images").iterdir()] == ["legal.jpg"]


# Masks' values


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_compressed_mask_gets_its_classes_back(quality: int) -> None:
    """The edge between 0 and 255 passes by 85, and must not become a rim of things."""
    classes = np.zeros((128, 128), np.uint8)
    classes[20:100, 10:60], classes[30:120, 70:110] = 85, 255
    buffer = io.BytesIO()
    Image.fromarray(classes).convert("RGB").save(buffer, "JPEG", quality=quality)
    mask = Image.open(buffer)
    with pytest.raises(ValueError, match="channel mean"):
        LAYOUTS["trans10k"].read_label(mask)
    back = np.asarray(snapped(mask, "trans10k_classes", LAYOUTS["trans10k_classes"]))[..., 0]
    assert (back != classes).mean() < 0.003
    assert not ((back == 85) & (cv2.dilate((classes == 85).astype(np.uint8), np.ones((9, 9), np.uint8)) == 0)).any()


@pytest.mark.parametrize("values", [(0, 1), (0, 128), (0, 85, 170), (0, 1, 2, 3)])
def test_another_coding_is_not_taken_for_noise(values: tuple[int, ...]) -> None:
    mask = np.zeros((60, 60), np.uint8)
    for number, value in enumerate(values):
        mask[number * 15 : number * 15 + 15] = value
    with pytest.raises(UnclearMaskError):
        snapped(Image.fromarray(mask), "trans10k", LAYOUTS["trans10k"])


def test_a_shifted_coding_is_noise() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 10:50] = 84
    back = np.asarray(snapped(Image.fromarray(mask), "trans10k", LAYOUTS["trans10k"]))
    assert np.array_equal(back[..., 0], np.where(mask > 0, 85, 0))


def test_masks_of_16_bits_are_read_by_their_range() -> None:
    mask = np.zeros((40, 40), np.uint16)
    mask[10:30, 5:20] = 65535
    back = np.asarray(snapped(Image.fromarray(mask), "trans10k", LAYOUTS["trans10k"]))
    assert np.array_equal(back[..., 0] == 255, mask > 0)
    assert soft_edges(Image.fromarray(mask)) == 0


# Turns


def test_the_right_turn_stands_out() -> None:
    for number in range(20):
        size = (96, 96) if number % 2 else (96, 72)
        image, mask = scene(number, size)
        for quarter, turn in enumerate(QUARTERS):
            turned = np.rot90(mask, -quarter).copy()  # so that this turn sets it right
            usable = QUARTERS if size[0] == size[1] else (QUARTERS[quarter], QUARTERS[(quarter + 2) % 4])
            scores = evidence(image, turned, usable)
            assert max(scores, key=lambda each: scores[each]) == turn
            assert scores[turn] > 2 + sorted(scores.values())[-2]


def test_only_edges_along_the_boundary_count_dark_or_bright() -> None:
    """A corner between two lines: they fit its boundary whichever side is bright, and not if they run across it."""
    mask = np.zeros((96, 96), np.uint8)
    mask[32:64, 32:64] = 1
    along = np.repeat(np.where(mask > 0, 150, 100).astype(np.uint8)[..., None], 3, axis=2)
    fitting = evidence(along, mask, [None])[None]
    assert fitting > 8
    assert evidence(255 - along, mask, [None])[None] == pytest.approx(fitting, rel=0.05)
    rows, columns = np.mgrid[:96, :96]
    beside = (np.abs(rows - 31.5) < 3) | (np.abs(rows - 63.5) < 3)
    teeth = np.where(beside, columns // 2 % 2, rows // 2 % 2) * 100  # lines across each side of the mask
    across = np.repeat(teeth.astype(np.uint8)[..., None], 3, axis=2)
    assert evidence(across, mask, [None])[None] < 0


def test_exif_turns_are_those_that_set_a_picture_upright() -> None:
    pixels = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    for orientation, turn in EXIF_TURNS.items():
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(buffer))
        assert np.array_equal(np.asarray(upright), np.asarray(Image.fromarray(pixels).transpose(turn)))


def inspect(root: Path, name: str) -> Inspection:
    (pair,) = [each for each in list_pairs(root, "trans10k", LAYOUTS["trans10k"]).pairs if each.image.stem == name]
    return inspect_pair(pair, root, "trans10k", LAYOUTS["trans10k"])


def test_without_evidence_no_turn_is_guessed(tmp_path: Path) -> None:
    """An even picture tells nothing; an object that looks the same upside down needs no telling."""
    root = tmp_path / "data"
    _, mask = scene(1)
    write(root, "train", "wall", np.full((72, 96, 3), 128, np.uint8), np.rot90(mask).copy())
    found = inspect(root, "wall")
    assert found.left_out
    assert [finding.kind for finding in found.findings] == ["rotated"]
    assert found.repair == MaskRepair()
    image, _ = scene(2)
    window = np.zeros((72, 96), np.uint8)
    window[20:52, 20:76] = 255
    image[20:52, 20:76] = 255 - image[20:52, 20:76] // 2
    write(root, "train", "window", image, np.rot90(window).copy())
    found = inspect(root, "window")
    assert not found.left_out
    assert found.repair.turn in (QUARTERS[1], QUARTERS[3])


def test_a_mask_of_equal_size_is_turned_only_on_strong_evidence(tmp_path: Path) -> None:
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for number in range(12):
        noise = cv2.GaussianBlur(rng.uniform(0, 255, (96, 96, 3)).astype(np.float32), (0, 0), 2)
        write(root, "train", f"noise{number}", noise.astype(np.uint8), size=(96, 96))
    assert kinds(root) == {}


def test_of_two_objects_alike_neither_is_taken_for_the_right_one(tmp_path: Path) -> None:
    """The picture holds the object, and upside down in the other half the same one with stronger edges."""
    image, mask = np.full((96, 96, 3), 90, np.uint8), np.zeros((96, 96), np.uint8)
    cv2.fillPoly(mask, [np.array([(10, 8), (30, 8), (30, 26), (60, 30), (56, 42), (10, 40)])], 255)
    image[mask > 0] += 60
    image[np.rot90(mask, 2) > 0] += 100
    scores = evidence(image, mask // 255, QUARTERS)
    assert max(scores, key=lambda turn: scores[turn]) == QUARTERS[2]
    assert scores[QUARTERS[2]] > SUPPORT
    root = tmp_path / "data"
    write(root, "train", "two", image, mask)
    assert kinds(root) == {}


def test_two_pictures_whose_names_differ_by_case_do_not_share_a_mask(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, "train", "cup")[1].rename(root / "train/masks/CUP_mask.png")
    write(root, "train", "Cup")[1].unlink()
    assert kinds(root) == {"missing": ["train/images/cup.jpg"], "name": ["train/masks/CUP_mask.png"]}


def test_a_picture_called_mask_keeps_its_own_mask(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a", "a_mask"):
        write(root, "train", name)[1].rename(root / f"train/masks/{name}.png")
    assert kinds(root, "folder") == {}
    pairs = scan("folder", root, "train").pairs
    assert [(pair.image_path.stem, pair.mask_path.stem) for pair in pairs] == [("a", "a"), ("a_mask", "a_mask")]
    for name in ("a_mask", "a"):
        (root / f"train/masks/{name}.png").rename(root / f"train/masks/{name}_mask.png")
    assert kinds(root, "folder") == {}
    assert [pair.mask_path.stem for pair in scan("folder", root, "train").pairs] == ["a_mask", "a_mask_mask"]


def test_two_pictures_to_convert_do_not_share_a_mask(tmp_path: Path) -> None:
    root = clean(tmp_path / "data")
    for suffix in (".bmp", ".gif"):
        write(root, "train", "cup", suffix=suffix)
    assert fix(root, tmp_path / "fixed") == 1
    assert not list((tmp_path / "fixed/train/images").glob("cup*"))


def test_a_new_name_is_nobody_elses(tmp_path: Path) -> None:
    root = clean(tmp_path / "data")
    for name in ("A", "a", "a_2"):
        write(root, "train", name)
    assert fix(root, tmp_path / "fixed") == 1
    fixed = sorted(path.stem for path in (tmp_path / "fixed/train/images").iterdir())
    assert fixed == ["A", "a_2", "a_3", "good0", "good1"]


def test_what_is_no_file_or_folder_is_told(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, "train", "cup")
    os.mkfifo(root / "train/images/pipe.png")
    (root / "train/images/loop.png").symlink_to("loop.png")
    (root / "train/masks/folder.png").mkdir()
    (root / "test").symlink_to("test")
    (root / "validation").touch()
    assert kinds(root) == {
        "folder": ["test", "validation"],
        "ignored": ["train/images/pipe.png", "train/masks/folder.png"],
        "unreadable": ["train/images/loop.png"],
    }


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_a_foreign_file_starts_no_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    write(root, "train", "good")
    write(root, "train", "a")[0].unlink()
    (root / "train/images" / name).write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 72\n%%EndComments\nshowpage\n"
    )

    def start(*_: object, **__: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    assert "started" not in str(kinds(root))


# Duplicates


def prints_of(*pictures: Picture) -> list[Fingerprint]:
    return [fingerprint(picture, picture.shape[1::-1]) for picture in pictures]


def compressed(picture: Picture, quality: int = 50) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_copies_are_found_smaller_compressed_brighter_and_mirrored() -> None:
    pictures = [scene(number, (256, 192))[0] for number in range(6)]
    changed = [
        compressed(pictures[0]),
        np.asarray(Image.fromarray(pictures[1]).resize((128, 96))),
        np.clip(pictures[2].astype(np.float32) * 1.15, 0, 255).astype(np.uint8),
        pictures[3][:, ::-1].copy(),
        pictures[4].copy(),
    ]
    twins = find_twins(prints_of(*pictures, *changed), [2] * 6 + [0] * 5)
    assert {number: twin.number for number, twin in twins.items()} == {6 + number: number for number in range(5)}
    assert [twins[6 + number].same_pixels for number in range(5)] == [False] * 4 + [True]
    assert [twins[6 + number].mirrored for number in range(5)] == [False] * 3 + [True, False]


def test_flat_pictures_are_twins_only_where_their_pixels_are_equal() -> None:
    rng = np.random.default_rng(0)
    walls = [np.clip(128 + rng.normal(0, 3, (96, 96, 3)), 0, 255).astype(np.uint8) for _ in range(6)]
    assert all(each.is_flat for each in prints_of(*walls))
    assert find_twins(prints_of(*walls), [0, 1, 2] * 2) == {}
    twins = find_twins(prints_of(*walls, walls[2]), [0, 1, 2] * 2 + [0])
    assert list(twins) == [6]
    assert twins[6] == Twin(2, 0, same_pixels=True)


def test_the_most_telling_twin_is_named() -> None:
    picture = scene(1)[0]
    near = compressed(picture)
    # train, train, validation, test: train names test although validation holds the same pixels.
    twins = find_twins(prints_of(picture, picture, picture, near), [0, 0, 1, 2])
    assert {number: twin.number for number, twin in twins.items()} == {0: 3, 1: 3, 2: 3}
    twins = find_twins(prints_of(picture, near, picture), [0, 0, 0])
    assert {number: (twin.number, twin.same_pixels) for number, twin in twins.items()} == {1: (0, False), 2: (0, True)}


def test_thousands_of_equal_pictures_take_no_time() -> None:
    prints = prints_of(scene(1)[0]) * 5000
    assert len(find_twins(prints, [0] * 5000)) == 4999


def test_a_picture_of_validation_that_is_in_test_leaves_validation(tmp_path: Path) -> None:
    root = clean(tmp_path / "data")
    image, mask = scene(9)
    write(root, "validation/hard", "again", image, mask)
    write(root, "test/easy", "again", image, mask)
    write(root, "train", "again", image, mask)
    assert kinds(root) == {
        "leak_train_test": ["train/images/again.jpg"],
        "leak_validation_test": ["validation/hard/images/again.jpg"],
    }
    fix(root, tmp_path / "fixed")
    assert kinds(tmp_path / "fixed") == {}
    assert (tmp_path / "fixed/test/easy/images/again.jpg").is_file()


def test_rows_and_tiles_are_capped_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = clean(tmp_path / "data")
    for number in range(9):
        write(root, "train", f"dark{number}", mask=np.zeros((72, 96), np.uint8))
    monkeypatch.setattr(contact_sheet, "TILES_OF_A_KIND", 2)
    monkeypatch.setattr(contact_sheet, "ROWS_OF_A_KIND", 3)
    assert main([str(root), "--out", str(tmp_path / "audit"), "--workers", "1"]) == 0
    assert "and 4 more in audit.json" in capsys.readouterr().out
    sheet = (tmp_path / "audit" / SHEET_FILE_NAME).read_text()
    section = sheet.split('id="empty"')[1].split('id="pairs"')[0]
    assert section.count("<figure>") == 2
    assert "and 4 more in audit.json" in section
