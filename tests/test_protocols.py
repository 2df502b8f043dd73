"""Each protocol on hand-counted masks, and folders of masks scored by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.test_metrics import EMPTY, FULL, LEFT, PIXEL, PUBLISHED, TOP, mask_of, run_metrics
from utils.errors import InputError
from utils.metrics import score_folder, score_folders
from utils.protocols import (
    boundary_iou,
    calibration,
    confusion,
    histogram,
    score_glass,
    score_translab,
    summarise_classes,
    summarise_glass,
    summarise_translab,
)


def sure(text: str) -> NDArray[np.uint8]:
    return mask_of(text) * np.uint8(255)


@pytest.mark.parametrize(
    ("mask", "truth", "iou", "ber", "accuracy"),
    [
        (EMPTY, EMPTY, 1, 0, 1),
        (FULL, FULL, 1, 0, 1),
        (EMPTY, FULL, 0, 50, 0),  # no pixel is outside, so that rate is 1
        (FULL, EMPTY, 0, 50, 0),
        (PIXEL, EMPTY, 0, 100 / 16, 7 / 8),
        (LEFT, TOP, 1 / 3, 50, 1 / 2),
        (FULL, LEFT, 1 / 2, 50, 1 / 2),
    ],
)
def test_glass_scores_are_those_counted_by_hand(mask: str, truth: str, iou: float, ber: float, accuracy: float) -> None:
    record = score_glass(sure(mask), mask_of(truth))
    assert (record.iou, record.ber, record.accuracy) == pytest.approx((iou, ber, accuracy))
    assert record.mae == pytest.approx(1 - accuracy)  # a sure prediction errs by whole pixels


def test_glass_is_predicted_from_one_half_on_and_its_error_is_that_of_the_soft_mask() -> None:
    soft = np.array([[127, 128, 255, 0]], np.uint8)
    record = score_glass(soft, np.array([[True, True, False, False]]))
    assert record.iou == pytest.approx(1 / 3)
    assert record.mae == pytest.approx((128 + 127 + 255 + 0) / (4 * 255))


def test_f_beta_takes_the_best_threshold_of_the_mean_curves() -> None:
    # At a threshold of 101 to 200 the first picture is exact; the second is exact from 1 to 50.
    first = score_glass(np.array([[200, 100]], np.uint8), np.array([[True, False]]))
    second = score_glass(np.array([[50, 0]], np.uint8), np.array([[True, False]]))
    assert first.precision[[0, 100, 101, 200]] == pytest.approx([0.5, 0.5, 1, 1], abs=1e-4)
    assert first.recall[[200, 201]] == pytest.approx([1, 0], abs=1e-3)
    summary = summarise_glass([first, second])
    # From 1 to 50: precision (.5 + 1) / 2, recall 1. From 101 to 200: precision 1 by its epsilon, recall 1 / 2.
    assert summary["f_beta"] == pytest.approx(max(1.3 * 0.75 / (0.3 * 0.75 + 1), 1.3 * 0.5 / (0.3 + 0.5)), abs=1e-3)
    assert summary["iou"] == pytest.approx(0.5)


BACKGROUND, THING, GLASS = 0, 1, 2


def test_translab_sums_classes_over_the_data_set() -> None:
    truth = np.array([[1, 1, 2, 0]], np.uint8)
    records = [
        score_translab(np.array([[1, 2, 2, 0]], np.uint8), truth),
        score_translab(np.array([[1, 1, 0, 0]], np.uint8), np.array([[1, 1, 0, 0]], np.uint8)),
    ]
    summary = summarise_translab(records)
    assert summary["iou_things"] == pytest.approx((1 + 2) / (2 + 2))
    assert summary["iou_stuff"] == pytest.approx(1 / 2)
    assert summary["miou"] == pytest.approx((0.75 + 0.5) / 2)
    assert summary["accuracy"] == pytest.approx(4 / 5)
    assert summary["mae"] == pytest.approx((1 / 4 + 0) / 2)
    # Things: 1 of 2 hit, both others right; then all right. Stuff: hit, and 2 of the 3 others right; absent from the second.
    assert summary["ber_things"] == pytest.approx((100 * (1 - (0.5 + 1) / 2) + 0) / 2)
    assert summary["ber_stuff"] == pytest.approx(100 * (1 - (1 + 2 / 3) / 2))


def test_a_class_that_never_occurs_has_no_figure() -> None:
    summary = summarise_translab([score_translab(np.array([[1, 0]], np.uint8), np.array([[1, 0]], np.uint8))])
    assert (summary["iou_things"], summary["iou_stuff"], summary["miou"]) == (1, None, None)
    empty = summarise_translab([score_translab(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))])
    assert (empty["accuracy"], empty["mae"]) == (None, 0)
    with pytest.raises(ValueError, match="labels must be 0"):
        score_translab(np.full((1, 1), 3, np.uint8), np.zeros((1, 1), np.uint8))


def test_classes_are_counted_over_the_data_set() -> None:
    first = confusion(np.array([[0, 1, 2, 2]], np.uint8), np.array([[0, 1, 1, 2]], np.uint8), 4)
    second = confusion(np.array([[1, 1]], np.uint8), np.array([[1, 0]], np.uint8), 4)
    assert first.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    summary = summarise_classes([first, second], ["background", "cup", "jar", "box"])
    assert summary["iou"] == {
        "background": pytest.approx(1 / 2),
        "cup": pytest.approx(2 / 4),
        "jar": pytest.approx(1 / 2),
        "box": None,
    }
    assert summary["miou"] == pytest.approx(1 / 2)
    assert summary["miou_without_background"] == pytest.approx(1 / 2)
    assert summary["accuracy"] == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="labels must be 0 to 3"):
        confusion(np.full((1, 1), 4, np.uint8), np.zeros((1, 1), np.uint8), 4)


def test_calibration_compares_certainty_with_the_share_of_glass() -> None:
    soft = np.array([[51, 51, 51, 51, 204, 204]], np.uint8)  # .2 and .8
    truth = np.array([[True, False, False, False, True, True]])
    found = calibration(histogram(soft, truth), num_bins=5)
    assert [(each["certainty"], each["glass"], each["share"]) for each in found["bins"]] == [
        pytest.approx((0.2, 1 / 4, 4 / 6)),
        pytest.approx((0.8, 1, 2 / 6)),
    ]
    assert found["ece"] == pytest.approx(4 / 6 * 0.05 + 2 / 6 * 0.2)
    sure = calibration(histogram(np.array([[255, 0]], np.uint8), np.array([[True, False]])))
    assert sure["ece"] == 0
    assert [each["share"] for each in sure["bins"]] == [0.5, 0.5]


def test_boundary_iou_looks_at_borders_alone() -> None:
    truth = np.zeros((50, 50), np.bool_)
    truth[10:40, 10:40] = True
    shifted = np.roll(truth, 1, axis=1)
    assert boundary_iou(truth, truth) == 1
    assert boundary_iou(np.zeros_like(truth), np.zeros_like(truth)) == 1
    assert boundary_iou(truth, np.zeros_like(truth)) == 0
    # The width is round(.02 * 70.7) = 1: rings of 116 pixels, of which the shift leaves two rows of 29 in common.
    assert boundary_iou(shifted, truth) == pytest.approx(58 / (2 * 116 - 58))
    full = np.ones_like(truth)
    assert boundary_iou(full, full) == 1  # the picture's edge is a border too
    hollow = full.copy()
    hollow[1:-1, 1:-1] = False
    assert boundary_iou(hollow, full) == 1


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published predictions are not here")
def test_two_folders_give_what_one_folder_gives(tmp_path: Path) -> None:
    for kind, folder in (("maskq", tmp_path / "predictions"), ("maskgt", tmp_path / "truths")):
        folder.mkdir()
        for path in PUBLISHED.glob(f"*_{kind}.png"):
            (folder / path.name.replace(f"_{kind}", "" if kind == "maskq" else "_mask")).write_bytes(path.read_bytes())
    found = score_folders(tmp_path / "predictions", tmp_path / "truths", ["per_image", "glass"])
    expected = [score.iou for score in score_folder(PUBLISHED)]
    assert found["per_image"]["iou"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert found["glass"]["iou"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0 < found["per_image"]["boundary_iou"] < found["per_image"]["iou"]


def write(folder: Path, **masks: NDArray[np.uint8]) -> Path:
    folder.mkdir()
    for name, values in masks.items():
        Image.fromarray(values).save(folder / f"{name}.png")
    return folder


def test_the_command_scores_by_every_protocol_asked_for(tmp_path: Path) -> None:
    truth = np.zeros((64, 64), np.uint8)
    truth[:, :16], truth[:, 16:32] = 85, 255
    truths = write(tmp_path / "truths", a_mask=truth, b_mask=truth)
    predictions = write(tmp_path / "predictions", a=truth, b=truth[::2, ::2])
    done = run_metrics(predictions, truths, "--protocol", "translab", "glass")
    found = json.loads(done.stdout)
    assert list(found) == ["glass", "translab"]
    assert (found["translab"]["miou"], found["translab"]["mber"]) == (1, 0)
    assert found["glass"]["iou"] == pytest.approx(1, abs=0.02)  # label maps under that protocol too
    soft = json.loads(run_metrics(predictions, truths, "--protocol", "glass").stdout)["glass"]
    assert soft["iou"] == 1  # in Trans10k's greys alone 85 is a class and not a certainty of a third
    assert run_metrics(predictions, "--protocol", "glass").stderr == (
        "error: --protocol: needs two folders, PREDICTIONS and TRUTHS\n"
    )


def test_masks_of_16_bits_are_read_whole_and_a_soft_truth_is_glass_from_one_half(tmp_path: Path) -> None:
    truth = np.array([[0, 100, 200, 255]], np.uint8)
    predictions = write(tmp_path / "predictions", a=np.array([[0, 0, 0x8100, 0xFFFF]], np.uint16))
    found = score_folders(predictions, write(tmp_path / "truths", a=truth), ["per_image"])
    assert found["per_image"]["iou"] == 1
    assert found["per_image"]["mse"] == pytest.approx((126 / 255) ** 2 / 4, abs=1e-6)


def test_maps_of_class_ids_are_refused_and_coloured_masks_read(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [2, 1]], np.uint8)
    white = np.array([[0, 255], [255, 255]], np.uint8)
    truths = write(tmp_path / "truths", a=white, b=np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match=r"ids/a\.png: its brightest grey is 2, a map of class ids"):
        score_folders(truths, write(tmp_path / "ids", a=ids, b=white), ["glass"])
    with pytest.raises(InputError, match=r"ids_too: the brightest grey of all is 2"):
        score_folders(write(tmp_path / "ids_too", a=ids, b=0 * ids), truths, ["per_image"])
    dark = write(tmp_path / "dark", a=white, b=np.full((2, 2), 90, np.uint8))  # certain of nothing, which is no map
    assert score_folders(dark, truths, ["per_image"])["per_image"]["iou"] == 1
    things = write(tmp_path / "things", a=white // 3, b=0 * white)  # Trans10k's 85
    assert score_folders(things, things, ["per_image", "translab"])["per_image"]["recall"] == 1
    assert score_folders(things, truths, ["per_image"])["per_image"]["iou"] == 1
    coloured = np.stack([white // 255 * np.uint8(80), 0 * white, 0 * white], axis=2)
    found = score_folders(write(tmp_path / "coloured", a=coloured, b=0 * coloured), truths, ["per_image"])
    assert found["per_image"]["iou"] == 1
    found = score_folders(truths, tmp_path / "coloured", ["per_image"])
    assert found["per_image"]["iou"] == 1


def test_bad_folders_are_named(tmp_path: Path) -> None:
    ok = write(tmp_path / "ok", a=np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match="gone: no such folder of masks"):
        score_folders(tmp_path / "gone", ok, ["glass"])
    with pytest.raises(InputError, match="empty: holds no PNG"):
        score_folders(ok, write(tmp_path / "empty"), ["glass"])
    with pytest.raises(
        InputError, match=r"other: 2 masks are in one folder alone|ok: 2 masks are in one folder alone, a here"
    ):
        score_folders(ok, write(tmp_path / "other", b=np.zeros((4, 4), np.uint8)), ["glass"])
    twice = write(tmp_path / "twice", a=np.zeros((4, 4), np.uint8), a_mask=np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"twice: a\.png and a_mask\.png are masks of one name"):
        score_folders(twice, ok, ["glass"])
    with pytest.raises(InputError, match=r"a\.png: grey 7 is no class"):
        score_folders(write(tmp_path / "odd", a=np.full((4, 4), 7, np.uint8)), ok, ["translab"])
