"""Folders on disk to checked pairs to samples."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.codecs import BinaryCodec, PaletteCodec, read_nonzero_label, read_trans10k_label
from dataset.trans10k import LAYOUTS, PairDataset, Scan, collate, layout_of, scan
from dataset.transforms import read_label
from tests.conftest import ROOT, write_pair, write_trans10k
from utils.errors import InputError

PUBLISHED_SAMPLE = ROOT.parent / "shared" / "trans10k_sample"


def names(found: Scan) -> list[str]:
    return [pair.name for pair in found.pairs]


def refused(*arguments: Any, **options: Any) -> str:
    """Returns the error of a scan that must be refused; it is one line."""
    with pytest.raises(InputError) as caught:
        scan(*arguments, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, size: tuple[int, int] = (12, 10), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def own_folder(root: Path, split: str = "train", count: int = 3) -> Path:
    """Writes a data set in the `folder` layout."""
    for number in range(count):
        write_pair(root / split, str(number), number)
    return root


# What is found


def test_the_training_split_has_no_difficulty(trans10k: Path) -> None:
    found = scan("trans10k", trans10k, "train")
    assert names(found) == ["0", "1", "2", "3", "4", "5"]
    assert {pair.difficulty for pair in found.pairs} == {""}
    assert str(found) == "train: 6 pairs"


@pytest.mark.parametrize(("split", "count"), [("validation", 3), ("test", 5)])
def test_a_difficulty_is_its_own_folder(split: str, count: int, trans10k: Path) -> None:
    for difficulty in ("easy", "hard"):
        found = scan("trans10k", trans10k, split, difficulty)
        assert names(found) == [str(number) for number in range(count)]
        for pair in found.pairs:
            assert pair.difficulty == difficulty
            assert pair.image_path == trans10k / split / difficulty / "images" / f"{pair.name}.jpg"
            assert pair.mask_path == trans10k / split / difficulty / "masks" / f"{pair.name}_mask.png"


def test_a_mix_holds_both_and_equal_stems_get_their_difficulty_as_prefix(trans10k: Path) -> None:
    found = scan("trans10k", trans10k, "validation", "mix")
    assert names(found) == ["easy_0", "easy_1", "easy_2", "hard_0", "hard_1", "hard_2"]
    assert str(found) == "validation: 6 pairs (3 easy, 3 hard)"


def test_only_equal_stems_get_a_prefix(tmp_path: Path) -> None:
    for folder, stem in (("easy", "cup"), ("easy", "door"), ("hard", "cup"), ("hard", "pane")):
        write_pair(tmp_path / "test" / folder, stem, 0)
    assert names(scan("trans10k", tmp_path, "test")) == ["easy_cup", "door", "hard_cup", "pane"]


def test_names_stay_unique_when_a_stem_looks_like_a_prefixed_one(tmp_path: Path) -> None:
    for folder, stem in (("easy", "cup"), ("hard", "cup"), ("hard", "easy_cup"), ("hard", "hard_cup")):
        write_pair(tmp_path / "test" / folder, stem, 0)
    found = names(scan("trans10k", tmp_path, "test"))
    assert len(set(found)) == 4
    assert found == ["easy_cup", "hard_cup", "hard_easy_cup", "hard_hard_cup"]


def test_pairs_are_sorted_whatever_the_order_on_disk(tmp_path: Path) -> None:
    for stem in ("b10", "a", "b2", "C", "z", "00"):
        write_pair(tmp_path / "train", stem, 0)
    assert names(scan("folder", tmp_path, "train")) == ["00", "C", "a", "b10", "b2", "z"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, ["easy_0"]),
        (2, ["easy_0", "hard_0"]),
        (4, ["easy_0", "easy_2", "hard_0", "hard_2"]),
        (10, [f"{difficulty}_{number}" for difficulty in ("easy", "hard") for number in range(5)]),
        (99, [f"{difficulty}_{number}" for difficulty in ("easy", "hard") for number in range(5)]),
    ],
)
def test_a_limit_is_spread_evenly_over_the_split(limit: int, expected: list[str], trans10k: Path) -> None:
    pairs = scan("trans10k", trans10k, "test", limit=limit).pairs
    assert [f"{pair.difficulty}_{pair.image_path.stem}" for pair in pairs] == expected


def test_a_pairs_number_depends_neither_on_the_selection_nor_on_the_place_of_the_data(
    trans10k: Path, tmp_path: Path
) -> None:
    def numbers(root: Path, difficulty: str, **options: Any) -> dict[str, int]:
        pairs = scan("trans10k", root, "test", difficulty, **options).pairs
        return {f"{pair.difficulty}/{pair.image_path.stem}": pair.number for pair in pairs}

    whole = numbers(trans10k, "mix")
    assert len(set(whole.values())) == len(whole) == 10
    assert numbers(trans10k, "easy") | numbers(trans10k, "hard") == whole
    assert numbers(trans10k, "mix", limit=4).items() <= whole.items()
    assert len(numbers(trans10k, "hard", limit=2).items() & whole.items()) == 2
    assert numbers(Path(shutil.copytree(trans10k, tmp_path / "copy")), "mix") == whole
    assert whole["easy/0"] == 1539716571  # the same in every process


def test_a_command_needs_only_the_split_that_it_reads(tmp_path: Path) -> None:
    write_trans10k(tmp_path, train=2)
    shutil.rmtree(tmp_path / "validation")
    shutil.rmtree(tmp_path / "test" / "hard")
    assert len(scan("trans10k", tmp_path, "train").pairs) == 2
    assert len(scan("trans10k", tmp_path, "test", "easy").pairs) == 5
    assert "hard" in refused("trans10k", tmp_path, "test", "hard")
    assert str(tmp_path / "validation" / "easy") in refused("trans10k", tmp_path, "validation", "easy")


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WebP"])
@pytest.mark.parametrize("mask", ["cup_mask.png", "cup.png", "cup_mask.PNG"])
def test_pictures_and_masks_of_every_allowed_name_are_found(suffix: str, mask: str, tmp_path: Path) -> None:
    image_path = save(tmp_path / "train" / "images" / f"cup{suffix}")
    mask_path = save(tmp_path / "train" / "masks" / mask)
    (pair,) = scan("folder", tmp_path, "train").pairs
    assert (pair.name, pair.image_path, pair.mask_path) == ("cup", image_path, mask_path)


def test_a_stem_may_hold_dots_and_spaces(tmp_path: Path) -> None:
    save(tmp_path / "train" / "images" / "my cup.v2.jpg")
    save(tmp_path / "train" / "masks" / "my cup.v2_mask.png")
    assert names(scan("folder", tmp_path, "train")) == ["my cup.v2"]


def test_hidden_files_folders_and_other_files_are_ignored(tmp_path: Path) -> None:
    own_folder(tmp_path, count=2)
    for kind in ("images", "masks"):
        folder = tmp_path / "train" / kind
        (folder / "._0.png").write_bytes(b"no picture")
        (folder / ".hidden.jpg").write_bytes(b"no picture")
        (folder / "notes.txt").write_text("notes")
        (folder / "Thumbs.db").write_bytes(b"\0")
        (folder / "folder.png").mkdir()
    assert names(scan("folder", tmp_path, "train")) == ["0", "1"]


def test_the_folder_layout_has_no_difficulties(tmp_path: Path) -> None:
    own_folder(tmp_path, "test")
    assert names(scan("folder", tmp_path, "test")) == ["0", "1", "2"]
    assert "use mix" in refused("folder", tmp_path, "test", "hard")


def test_every_file_is_opened_once(trans10k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[Path] = Counter()
    real_open = Image.open

    def counting_open(path: Path, *arguments: Any, **options: Any) -> Image.Image:
        opened[Path(path)] += 1
        return real_open(path, *arguments, **options)

    def no_pixels(image: Image.Image) -> None:
        raise AssertionError(f"pixels of {image} were read")

    monkeypatch.setattr(Image, "open", counting_open)
    monkeypatch.setattr(Image.Image, "load", no_pixels)
    found = scan("trans10k", trans10k, "test")
    expected = [path for pair in found.pairs for path in (pair.image_path, pair.mask_path)]
    assert opened == Counter(expected)


# What is wrong with the folders


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    text = refused("trans10k", tmp_path / "nowhere", "train")
    assert text.startswith(f"{tmp_path / 'nowhere'}: ")
    assert "dataset_path" in text
    save(tmp_path / "file.png")
    assert refused("trans10k", tmp_path / "file.png", "train").startswith(f"{tmp_path / 'file.png'}: ")


@pytest.mark.parametrize("dataset_name", ["trans10k", "folder"])
def test_a_missing_split_folder_is_named(dataset_name: str, tmp_path: Path) -> None:
    own_folder(tmp_path, "train")
    text = refused(dataset_name, tmp_path, "validation")
    assert text.startswith(str(tmp_path / "validation"))
    assert "no such folder" in text
    assert dataset_name in text


def test_a_missing_masks_folder_is_named(tmp_path: Path) -> None:
    own_folder(tmp_path)
    shutil.rmtree(tmp_path / "train" / "masks")
    assert refused("folder", tmp_path, "train").startswith(f"{tmp_path / 'train' / 'masks'}: no such folder")


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    text = refused("folder", tmp_path, "train")
    assert text.startswith(f"{tmp_path}: ")
    assert "train split" in text
    assert "holds no pictures" in text


def test_pictures_without_a_mask_are_named(tmp_path: Path) -> None:
    own_folder(tmp_path, count=4)
    for number in (1, 3):
        (tmp_path / "train" / "masks" / f"{number}_mask.png").unlink()
    text = refused("folder", tmp_path, "train")
    assert text.startswith(f"{tmp_path / 'train' / 'images'}: 2 pictures have no mask in masks/: 1.jpg, 3.jpg.")


def test_masks_without_a_picture_are_named(tmp_path: Path) -> None:
    own_folder(tmp_path, count=4)
    (tmp_path / "train" / "images" / "2.jpg").unlink()
    text = refused("folder", tmp_path, "train")
    assert text.startswith(f"{tmp_path / 'train' / 'masks'}: 1 masks have no picture in images/: 2_mask.png.")


def test_many_lonely_pictures_are_counted_and_some_are_named(tmp_path: Path) -> None:
    (tmp_path / "train" / "masks").mkdir(parents=True)
    for number in range(20):
        save(tmp_path / "train" / "images" / f"{number:02}.jpg")
    text = refused("folder", tmp_path, "train")
    assert "20 pictures have no mask" in text
    assert "00.jpg, 01.jpg" in text
    assert "and 12 more" in text


def test_a_mask_that_is_no_png_does_not_count(tmp_path: Path) -> None:
    save(tmp_path / "train" / "images" / "cup.jpg")
    save(tmp_path / "train" / "masks" / "cup_mask.jpg")
    assert "cup.jpg" in refused("folder", tmp_path, "train")


def test_two_masks_for_one_picture_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "train" / "images" / "cup.jpg")
    save(tmp_path / "train" / "masks" / "cup_mask.png")
    save(tmp_path / "train" / "masks" / "cup.png")
    assert "cup.png" in refused("folder", tmp_path, "train")


@pytest.mark.parametrize(("kind", "twins"), [("images", ("0.jpg", "0.png")), ("images", ("0.jpg", "0.JPEG"))])
def test_equal_stems_with_different_suffixes_are_refused(kind: str, twins: tuple[str, str], tmp_path: Path) -> None:
    own_folder(tmp_path)
    save(tmp_path / "train" / kind / twins[1])
    text = refused("folder", tmp_path, "train")
    assert text.startswith(f"{tmp_path / 'train' / kind}: ")
    assert all(twin in text for twin in twins)


# What is wrong with the files


@pytest.fixture
def mismatched(tmp_path: Path) -> Path:
    """Six pairs; 1 and 3 are rotated against each other, 4 differs otherwise."""
    own_folder(tmp_path, count=6)
    for number, size in ((1, (36, 40)), (3, (36, 40)), (4, (20, 18))):
        save(tmp_path / "train" / "masks" / f"{number}_mask.png", size)
    return tmp_path


def test_all_pairs_of_different_size_are_listed_at_once(mismatched: Path) -> None:
    text = refused("folder", mismatched, "train")
    assert text.startswith(f"{mismatched}: 3 pairs differ in size: ")
    listed = text.split("; ")
    images = mismatched / "train" / "images"
    for number, sizes in ((1, "40x36 and 36x40"), (3, "40x36 and 36x40"), (4, "40x36 and 20x18")):
        (entry,) = [part for part in listed if f"{images / str(number)}.jpg with {number}_mask.png" in part]
        assert sizes in entry
        assert ("rotated by 90 degrees" in entry) == (number != 4)
    assert "mismatched_pairs: skip" in text
    assert not any(str(images / f"{number}.jpg") in text for number in (0, 2, 5))


def test_pairs_of_different_size_can_be_skipped(mismatched: Path) -> None:
    found = scan("folder", mismatched, "train", mismatched_pairs="skip")
    assert names(found) == ["0", "2", "5"]
    assert len(found.skipped) == 3
    assert str(found).startswith("train: 3 pairs (3 skipped because picture and mask differ in size: ")
    assert all(f"{number}.jpg" in str(found) for number in (1, 3, 4))


def test_a_limit_counts_what_is_left_after_skipping(mismatched: Path) -> None:
    assert names(scan("folder", mismatched, "train", mismatched_pairs="skip", limit=2)) == ["0", "2"]


def test_a_split_in_which_every_pair_differs_is_refused(tmp_path: Path) -> None:
    own_folder(tmp_path, count=2)
    for number in range(2):
        save(tmp_path / "train" / "masks" / f"{number}_mask.png", (7, 7))
    assert "every pair" in refused("folder", tmp_path, "train", mismatched_pairs="skip")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_picture_stored_rotated_pairs_with_its_upright_mask(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "train" / "images" / f"cup.{suffix}", (40, 24), exif=exif)
    save(tmp_path / "train" / "masks" / "cup_mask.png", (24, 40), "L")
    (pair,) = scan("folder", tmp_path, "train").pairs
    sample = PairDataset([pair], read_nonzero_label, 16)[0, 0]
    assert sample["image"].shape[1:] == sample["label"].shape == (16, 16)
    save(tmp_path / "train" / "masks" / "cup_mask.png", (40, 24), "L")  # as it is stored: not upright
    assert "24x40 and 40x24, rotated by 90 degrees" in refused("folder", tmp_path, "train")


def test_an_exif_orientation_without_a_turn_leaves_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "train" / "images" / "cup.jpg", (40, 24), exif=exif)
    save(tmp_path / "train" / "masks" / "cup_mask.png", (40, 24), "L")
    assert len(scan("folder", tmp_path, "train").pairs) == 1


def test_a_rotated_picture_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; to be shown turned by 90 degrees clockwise
    upright = np.zeros((40, 24, 3), np.uint8)
    upright[:20] = 255
    images, masks = tmp_path / "train" / "images", tmp_path / "train" / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(images / "cup.png", exif=exif)
    Image.fromarray(upright).save(masks / "cup.png")
    sample = PairDataset(scan("folder", tmp_path, "train").pairs, read_nonzero_label, 16)[0, 0]
    assert torch.equal((sample["image"].mean(0) > 0.5).to(torch.uint8), sample["label"])
    assert sample["label"][:8].all()


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n\0\0\0", b"\xff\xd8\xff\xe0\0"])
def test_a_broken_header_is_named_when_scanning(kind: str, content: bytes, tmp_path: Path) -> None:
    own_folder(tmp_path)
    path = tmp_path / "train" / kind / ("1.jpg" if kind == "images" else "1_mask.png")
    path.write_bytes(content)
    assert refused("folder", tmp_path, "train").startswith(f"{path}: cannot be read as a picture")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_cut_off_anywhere_is_named(suffix: str, tmp_path: Path) -> None:
    images, masks = tmp_path / "train" / "images", tmp_path / "train" / "masks"
    write_pair(tmp_path / "train", "a", 0)
    path = images / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.open(images / "a.jpg").save(path, exif=exif)
    whole = path.read_bytes()
    if suffix != "jpg":
        (images / "a.jpg").unlink()
    refusals = 0
    for length in range(0, len(whole) - 20, max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        try:
            pairs = scan("folder", tmp_path, "train").pairs
            PairDataset(pairs, read_nonzero_label, 32)[0, 0]
        except InputError as error:
            assert str(error).startswith(f"{path}: cannot be read as a picture (")  # noqa: PT017
            refusals += 1
    assert refusals > 100
    assert (masks / "a_mask.png").is_file()


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    own_folder(tmp_path)
    path = tmp_path / "train" / "images" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    data = PairDataset(scan("folder", tmp_path, "train").pairs, read_nonzero_label, 32)
    assert data[0, 0]["name"] == "0"
    with pytest.raises(InputError) as caught:
        data[0, 1]
    assert str(caught.value).startswith(f"{path}: cannot be read as a picture (")


def test_a_truncated_mask_is_named_when_it_is_read(tmp_path: Path) -> None:
    own_folder(tmp_path)
    path = tmp_path / "train" / "masks" / "1_mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    data = PairDataset(scan("folder", tmp_path, "train").pairs, read_nonzero_label, 32)
    with pytest.raises(InputError) as caught:
        data[0, 1]
    assert str(caught.value).startswith(f"{path}: cannot be read as a mask (")


def test_unknown_mask_colours_are_named_when_they_are_read(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path / "train", str(number), number, value=200 if number == 1 else 255)
    path = tmp_path / "train" / "masks" / "1_mask.png"
    data = PairDataset(scan("trans10k", tmp_path, "train").pairs, read_trans10k_label, 32)
    with pytest.raises(InputError) as caught:
        data[7, 1]
    assert str(caught.value).startswith(f"{path}: has 360 pixels whose channel mean is none of 0, 85, 255")
    assert "(200, 200, 200)" in str(caught.value)
    folder_data = PairDataset(scan("folder", tmp_path, "train").pairs, read_nonzero_label, 32)
    assert folder_data[7, 1]["label"].sum() > 0


def test_an_error_in_a_worker_process_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    from utils.errors import one_line

    own_folder(tmp_path)
    path = tmp_path / "train" / "images" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    data = PairDataset(scan("folder", tmp_path, "train").pairs, read_nonzero_label, 32)
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[(0, 1)]], num_workers=1, collate_fn=collate)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert one_line(caught.value).startswith(f"{path}: cannot be read as a picture (")


# Batches


def test_the_layouts_read_masks_their_own_way() -> None:
    assert LAYOUTS["trans10k"].read_label is read_trans10k_label
    assert LAYOUTS["folder"].read_label is read_nonzero_label
    codecs = {name: type(layout.build_codec()) for name, layout in LAYOUTS.items()}
    assert codecs == {
        "trans10k": BinaryCodec,
        "trans10k_classes": PaletteCodec,
        "trans10k_v2": PaletteCodec,
        "folder": BinaryCodec,
    }


def test_the_second_version_keeps_its_ids_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for name in ("images", "masks_12"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(folder / "images" / "1.jpg")
    Image.fromarray(ids).save(folder / "masks_12" / "1_mask.png")
    (pair,) = scan("trans10k_v2", tmp_path, "train").pairs
    layout = layout_of("trans10k_v2")
    assert np.array_equal(read_label(pair.mask_path, layout.read_label), ids)
    Image.fromarray(ids + np.uint8(1)).save(folder / "masks_12" / "1_mask.png")
    with pytest.raises(InputError, match=r"1_mask.png: has the value 12 at row 2, column 3; class ids go from 0 to 11"):
        read_label(pair.mask_path, layout.read_label)


def test_the_second_version_may_lack_difficulties(tmp_path: Path) -> None:
    for name, suffix in (("images", "1.jpg"), ("masks_12", "1_mask.png")):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "test" / name / suffix)
    assert [pair.difficulty for pair in scan("trans10k_v2", tmp_path, "test").pairs] == [""]
    with pytest.raises(InputError, match="no such folder"):
        scan("trans10k", tmp_path, "test")


def test_a_palette_belongs_to_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "palette.json"
    path.write_text('{"background": [0, 0, 0], "cup": [255, 0, 0], "window": [0, 0, 255]}')
    layout = layout_of("folder", path)
    assert layout.codec == "palette"
    mask = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 255]]], np.uint8))
    assert layout.read_label(mask).tolist() == [[0, 1, 2]]
    odd = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 1]]], np.uint8))
    with pytest.raises(ValueError, match=r"has the colour \[255, 0, 1\] at row 0, column 1, which the palette lacks"):
        layout.read_label(odd)
    with pytest.raises(InputError, match="palette: is for dataset_name: folder"):
        layout_of("trans10k", path)


def test_collating_stacks_pixels_and_lists_the_rest(trans10k: Path) -> None:
    data = PairDataset(scan("trans10k", trans10k, "train").pairs, read_trans10k_label, 32)
    assert len(data) == 6
    batch = collate([data[2, 1], data[2, 4]])
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["label"].shape == (2, 32, 32)
    assert batch["label"].unique().tolist() == [0, 1]
    assert (batch["name"], batch["epoch"], batch["index"]) == (["1", "4"], [2, 2], [1, 4])
    assert batch["file"] == [str(trans10k / "train" / "images" / f"{number}.jpg") for number in (1, 4)]


@pytest.mark.skipif(not PUBLISHED_SAMPLE.is_dir(), reason="the published sample is not at hand")
def test_the_published_sample_is_read() -> None:
    for split in ("train", "validation", "test"):
        found = scan("trans10k", PUBLISHED_SAMPLE, split, mismatched_pairs="skip")
        assert found.pairs
        assert found.skipped == []
        label = PairDataset(found.pairs, read_trans10k_label, 64)[0, 0]["label"]
        assert label.unique().tolist() == [0, 1]
