"""The per-image protocol on hand-counted masks, on folders, and on published predictions."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import ROOT, environment
from utils.errors import InputError
from utils.metrics import PROTOCOL, PictureScore, best_threshold, iou_curves, score_folder, score_picture, summarise
from utils.protocols import histogram
from utils.report import BackgroundPngWriter, write_scores

PUBLISHED = ROOT.parent / "shared" / "published_predictions"


def mask_of(text: str) -> NDArray[np.bool_]:
    """Reads rows of `#` and `.`."""
    return np.array([[character == "#" for character in row] for row in text.split()])


def as_prediction(mask: NDArray[np.bool_], value: int = 255) -> NDArray[np.uint8]:
    return np.repeat(mask[..., None] * np.uint8(value), 3, axis=2)


def score(mask: str, truth: str, name: str = "", difficulty: str = "") -> PictureScore:
    return score_picture(as_prediction(mask_of(mask)), mask_of(mask), mask_of(truth), name, difficulty)


EMPTY, FULL, PIXEL, LEFT, TOP = ".... ....", "#### ####", "#... ....", "##.. ##..", "#### ...."


@pytest.mark.parametrize(
    ("mask", "truth", "iou", "recall", "mse"),
    [
        (EMPTY, EMPTY, 1, 1, 0),
        (PIXEL, EMPTY, 0, 0, 1 / 8),
        (FULL, EMPTY, 0, 0, 1),
        (EMPTY, PIXEL, 0, 0, 1 / 8),
        (EMPTY, FULL, 0, 0, 1),
        (FULL, FULL, 1, 1, 0),
        (PIXEL, PIXEL, 1, 1, 0),
        (FULL, PIXEL, 1 / 8, 1, 7 / 8),
        (PIXEL, FULL, 1 / 8, 1 / 8, 7 / 8),
        (LEFT, FULL, 1 / 2, 1 / 2, 1 / 2),
        (FULL, LEFT, 1 / 2, 1, 1 / 2),
        (LEFT, TOP, 1 / 3, 1 / 2, 1 / 2),
        (PIXEL, "...# ....", 0, 0, 1 / 4),
    ],
)
def test_scores_are_those_counted_by_hand(mask: str, truth: str, iou: float, recall: float, mse: float) -> None:
    scored = score(mask, truth)
    assert (scored.iou, scored.recall, scored.mse) == pytest.approx((iou, recall, mse))
    assert scored.empty_truth == (truth == EMPTY)
    assert scored.empty_mask == (mask == EMPTY)


def test_the_mse_is_of_the_raw_prediction_over_all_three_channels() -> None:
    prediction = np.zeros((2, 4, 3), np.uint8)
    prediction[0, 0] = (255, 51, 0)
    scored = score_picture(prediction, mask_of(EMPTY), mask_of(PIXEL))
    assert scored.mse == pytest.approx((0 + 0.8**2 + 1) / 24)
    assert scored.iou == 0


def test_the_mse_of_a_large_picture_does_not_overflow() -> None:
    truth = np.zeros((1024, 1024), np.bool_)
    assert score_picture(np.full((1024, 1024, 3), 255, np.uint8), truth, truth).mse == 1


@pytest.mark.parametrize(
    ("prediction", "mask", "truth"),
    [((2, 4, 3), (2, 4), (4, 2)), ((2, 4), (2, 4), (2, 4)), ((2, 4, 1), (2, 4), (2, 4)), ((2, 4, 3), (1, 4), (2, 4))],
)
def test_shapes_that_differ_are_refused(
    prediction: tuple[int, ...], mask: tuple[int, ...], truth: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        score_picture(np.zeros(prediction, np.uint8), np.zeros(mask, np.bool_), np.zeros(truth, np.bool_))


def test_the_curve_is_the_iou_at_every_threshold() -> None:
    rng = np.random.default_rng(0)
    soft, truth = rng.integers(0, 256, (9, 7), dtype=np.uint8), rng.random((9, 7)) > 0.5
    (curve,) = iou_curves(histogram(soft, truth)[None])
    for value in (0, 1, 100, 255):
        mask = soft >= value
        assert curve[value] == pytest.approx((mask & truth).sum() / (mask | truth).sum())
    (empty,) = iou_curves(histogram(np.full((2, 2), 9, np.uint8), np.zeros((2, 2), np.bool_))[None])
    assert (empty[:10] == 0).all()
    assert (empty[10:] == 1).all()


def test_the_best_threshold_is_of_the_mean_over_pictures() -> None:
    truth = np.array([[True, False]])
    soft = (np.array([[200, 100]], np.uint8), np.array([[150, 0]], np.uint8))
    threshold, iou = best_threshold(iou_curves(np.stack([histogram(each, truth) for each in soft])))
    assert iou == 1
    assert threshold == pytest.approx(100.5 / 255, abs=1e-6)  # the lowest that 100 does not exceed and 150 does
    assert 100 / 255 < threshold < 101 / 255


def test_the_summary_has_means_over_pictures_for_all_and_for_each_difficulty() -> None:
    scores = [
        score(FULL, FULL, "a", "easy"),
        score(LEFT, FULL, "b", "easy"),
        score(EMPTY, EMPTY, "c", "easy"),
        score(FULL, PIXEL, "d", "hard"),
        score(PIXEL, EMPTY, "e", "hard"),
    ]
    summary = summarise(scores)
    assert summary["iou"] == pytest.approx((1 + 0.5 + 1 + 0.125 + 0) / 5)
    assert summary["recall"] == pytest.approx((1 + 0.5 + 1 + 1 + 0) / 5)
    assert summary["mse"] == pytest.approx((0 + 0.5 + 0 + 0.875 + 0.125) / 5)
    assert summary["protocol"] == PROTOCOL
    counts = ("num_images", "num_empty_truth", "num_empty_truth_and_mask")
    assert [summary[name] for name in counts] == [5, 2, 1]
    assert [summary["easy"][name] for name in counts] == [3, 1, 1]
    assert [summary["hard"][name] for name in counts] == [2, 1, 0]
    assert summary["easy"]["iou"] == pytest.approx(2.5 / 3, abs=1e-6)
    assert summary["hard"]["iou"] == pytest.approx(0.0625)
    assert summary["hard"]["mse"] == pytest.approx(0.5)


def test_a_data_set_without_difficulties_has_none_in_its_summary() -> None:
    summary = summarise([score(FULL, LEFT)])
    assert [name for name, value in summary.items() if isinstance(value, dict)] == []


def test_no_score_is_ever_nan() -> None:
    masks = [np.array([[bit >> 1 & 1, bit & 1]], np.bool_) for bit in range(4)]
    scores = [score_picture(as_prediction(mask), mask, truth) for mask in masks for truth in masks]
    assert all(math.isfinite(value) for one in scores for value in (one.iou, one.recall, one.mse))
    summary = summarise(scores)
    assert all(math.isfinite(summary[name]) for name in ("iou", "recall", "mse"))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published predictions are not here")
def test_published_predictions_have_their_published_scores() -> None:
    with (PUBLISHED / "expected.csv").open(newline="") as file:
        expected = {row["name"]: row for row in csv.DictReader(file)}
    scores = {one.name: one for one in score_folder(PUBLISHED)}
    assert scores.keys() == expected.keys()
    for name, row in expected.items():
        for column in ("iou", "recall", "mse"):
            assert getattr(scores[name], column) == pytest.approx(float(row[column]), abs=1e-4), (name, column)


@pytest.fixture
def predictions(tmp_path: Path) -> tuple[Path, list[PictureScore]]:
    """A folder of predictions as inference writes it, and its scores."""
    folder, rng, scores = tmp_path / "predictions", np.random.default_rng(0), []
    folder.mkdir()
    with BackgroundPngWriter(folder) as write:
        for number in range(5):
            prediction = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            mask, truth = prediction.mean(axis=2) > 127, rng.random((6, 8)) > 0.5
            if number == 4:
                mask, truth = np.zeros_like(mask), np.zeros_like(truth)
            pictures = {"img": prediction, "pred": prediction, "maskq": mask * np.uint8(255)}
            name, difficulty = f"name_{number}", "hard" if number % 2 else "easy"
            write(name, {**pictures, "maskgt": truth * np.uint8(255)})
            scores.append(score_picture(prediction, mask, truth, name, difficulty))
    write_scores(folder, summarise(scores), scores)
    return folder, scores


def run_metrics(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "utils.metrics", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)


def test_the_command_prints_the_json_that_inference_wrote(predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, _ = predictions
    done = run_metrics(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "metrics.json").read_text()
    assert json.loads(done.stdout)["easy"]["num_images"] == 3


def test_the_command_prints_one_row_a_picture_when_asked(predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, scores = predictions
    done = run_metrics(folder, "--per_image")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["name"] for row in rows] == [one.name for one in scores]
    assert [float(row["mse"]) for row in rows] == pytest.approx([one.mse for one in scores], abs=1e-6)


def test_a_bad_folder_ends_the_command_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_metrics(tmp_path / "absent")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'absent'}: no such folder of predictions\n"


def test_a_folder_without_the_csv_is_scored_without_difficulties(predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, scores = predictions
    (folder / "per_image.csv").unlink()
    again = score_folder(folder)
    assert [one.iou for one in again] == [one.iou for one in scores]
    assert {one.difficulty for one in again} == {""}


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no NAME_maskq\.png"):
        score_folder(tmp_path)


@pytest.mark.parametrize("kind", ["maskgt", "pred"])
def test_a_missing_partner_is_named(kind: str, predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, _ = predictions
    (folder / f"name_3_{kind}.png").unlink()
    with pytest.raises(InputError, match=rf"name_3_{kind}\.png: missing"):
        score_folder(folder)


@pytest.mark.parametrize("kind", ["maskq", "maskgt", "pred"])
def test_a_broken_picture_is_named(kind: str, predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, _ = predictions
    file = folder / f"name_2_{kind}.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"name_2_{kind}\.png: cannot be read"):
        score_folder(folder)


def test_pictures_of_different_sizes_are_named(predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, _ = predictions
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(folder / "name_1_maskgt.png")
    with pytest.raises(InputError, match=r"name_1_\*\.png: shapes differ"):
        score_folder(folder)


def test_a_csv_that_is_none_is_refused(predictions: tuple[Path, list[PictureScore]]) -> None:
    folder, _ = predictions
    shutil.copyfile(folder / "name_1_pred.png", folder / "per_image.csv")
    with pytest.raises(InputError, match=r"per_image\.csv: cannot be read"):
        score_folder(folder)
