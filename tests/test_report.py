"""What an inference leaves behind: pictures in the background, tables, a folder replaced whole."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils.report
from utils.errors import EXIT_FAILED, CommandError
from utils.metrics import PictureScore, summarise
from utils.report import BackgroundPngWriter, format_table, place_for, replace_folder, write_evaluation, write_scores


def picture_score(name: str, difficulty: str, iou: float, empty_truth: bool = False) -> PictureScore:
    return PictureScore(name, difficulty, iou, iou / 2, 1 - iou, iou / 4, empty_truth, empty_truth)


SCORES = [
    picture_score("easy_a", "easy", 1.0),
    picture_score("b", "easy", 0.5, empty_truth=True),
    picture_score("hard_a", "hard", 1 / 3),
]


def test_every_picture_is_on_the_disk_when_the_writer_is_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = {
        f"name_{number}": {
            "pred": rng.integers(0, 256, (5, 7, 3), dtype=np.uint8),
            "maskq": rng.integers(0, 2, (5, 7), dtype=np.uint8) * np.uint8(255),
        }
        for number in range(100)
    }
    with BackgroundPngWriter(tmp_path) as write:
        for name, kinds in pictures.items():
            write(name, kinds)
    assert len(list(tmp_path.iterdir())) == 200
    for name, kinds in pictures.items():
        for kind, values in kinds.items():
            with Image.open(tmp_path / f"{name}_{kind}.png") as image:
                assert np.array_equal(np.asarray(image), values)


def test_pictures_are_written_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, save = threading.Event(), Image.Image.save
    threads = set()

    def slow(self: Image.Image, *arguments: object, **keywords: object) -> None:
        assert gate.wait(30)
        threads.add(threading.current_thread())
        save(self, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "save", slow)
    with BackgroundPngWriter(tmp_path) as write:
        write("a", {"img": np.zeros((2, 2, 3), np.uint8)})
        assert not list(tmp_path.iterdir())  # the caller came back before anything was written
        gate.set()
    assert [path.name for path in tmp_path.iterdir()] == ["a_img.png"]
    assert threading.current_thread() not in threads


def test_a_slow_disk_holds_up_the_caller_instead_of_filling_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils.report, "MAX_PENDING_PICTURES", 3)
    gate, queued = threading.Event(), []
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: gate.wait(30))
    with BackgroundPngWriter(tmp_path) as write:

        def queue() -> None:
            for number in range(5):
                write(str(number), {"img": np.zeros((2, 2), np.uint8)})
                queued.append(number)

        caller = threading.Thread(target=queue)
        caller.start()
        caller.join(0.2)
        assert queued == [0, 1, 2]
        gate.set()
        caller.join(30)
    assert queued == [0, 1, 2, 3, 4]


def write_many(folder: Path, error: Exception | None = None) -> None:
    """Writes 80 pictures and then fails, if there is an error to fail with."""
    with BackgroundPngWriter(folder) as write:
        for number in range(80):
            write(str(number), {"img": np.zeros((2, 2, 3), np.uint8)})
        if error is not None:
            raise error


def test_a_disk_that_refuses_ends_the_command_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "removed"  # never made: the files cannot be written
    with pytest.raises(CommandError) as caught:
        write_many(folder)
    assert str(caught.value).startswith(f"{folder}: a prediction could not be written")
    assert caught.value.exit_code == EXIT_FAILED


def test_one_file_that_is_refused_early_is_remembered_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def refuse_first(self: Image.Image, path: Path, **keywords: object) -> None:
        if path.name == "0_img.png":
            raise OSError(28, "No space left on device")
        save(self, path, **keywords)

    monkeypatch.setattr(Image.Image, "save", refuse_first)
    with pytest.raises(CommandError, match="No space left on device"):
        write_many(tmp_path)
    assert len(list(tmp_path.iterdir())) == 79


def test_an_error_of_the_caller_is_not_hidden_by_the_writers(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_many(tmp_path / "removed", ZeroDivisionError())


def test_scores_are_written_as_json_and_one_row_a_picture(tmp_path: Path) -> None:
    summary = summarise(SCORES)
    write_scores(tmp_path, summary, SCORES)
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    with (tmp_path / "per_image.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["name", "difficulty", "iou", "recall", "mse", "boundary_iou"]
    assert rows[0] == {
        "name": "easy_a",
        "difficulty": "easy",
        "iou": "1.0",
        "recall": "0.5",
        "mse": "0.0",
        "boundary_iou": "0.25",
    }
    assert rows[2] == {
        "name": "hard_a",
        "difficulty": "hard",
        "iou": "0.333333",
        "recall": "0.166667",
        "mse": "0.666667",
        "boundary_iou": "0.083333",
    }


def test_curves_are_means_over_pictures_at_every_threshold(tmp_path: Path) -> None:
    histograms = np.zeros((3, 2, 256), np.int64)
    histograms[:, :, 200] = 2  # two pixels of glass, each predicted at 200
    write_evaluation(tmp_path, {"intervals": {}}, histograms)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"intervals": {}}
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert {name: (values[200], values[201]) for name, values in curves.items()} == {
        "iou": (1, 0),
        "precision": (1, 1),
        "recall": (1, pytest.approx(0, abs=1e-4)),
    }


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()[1:]]


def test_the_table_has_a_row_each_for_mix_easy_and_hard() -> None:
    assert cells(format_table(summarise(SCORES))) == [
        ["mix", "0.6111", "0.3056", "0.3889", "0.1528", "3", "1"],
        ["easy", "0.7500", "0.3750", "0.2500", "0.1875", "2", "1"],
        ["hard", "0.3333", "0.1667", "0.6667", "0.0833", "1", "0"],
    ]
    header, *rows = format_table(summarise(SCORES)).splitlines()
    assert [word in header for word in ("IoU", "recall", "MSE", "boundary IoU", "pictures", "without glass")] == [
        True
    ] * 6
    assert {len(row) for row in rows} == {len(header)}


def test_the_table_of_one_difficulty_has_one_row() -> None:
    assert cells(format_table(summarise(SCORES[2:]), "hard")) == [
        ["hard", "0.3333", "0.1667", "0.6667", "0.0833", "1", "0"]
    ]


def test_the_table_of_a_data_set_without_difficulties_has_one_row() -> None:
    assert [row[0] for row in cells(format_table(summarise([picture_score("a", "", 1.0)])))] == ["mix"]


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    partial, final = tmp_path / ".partial-test", tmp_path / "test"
    for folder, name in ((partial, "new.png"), (final, "old.png"), (tmp_path / ".old-test", "leftover.png")):
        folder.mkdir()
        (folder / name).touch()
    replace_folder(partial, final)
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
    assert [path.name for path in final.iterdir()] == ["new.png"]


def test_a_first_folder_is_moved_into_place(tmp_path: Path) -> None:
    (tmp_path / ".partial-test").mkdir()
    replace_folder(tmp_path / ".partial-test", tmp_path / "test")
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_results_of_other_settings_lie_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "test_mix_3"

    def put(details: dict[str, object]) -> str:
        place = place_for(folder, details)
        place.mkdir(exist_ok=True)
        (place / "inference.json").write_text(json.dumps(details))
        return place.name

    assert put({"tta": "none"}) == "test_mix_3"
    assert put({"tta": "flip"}) == "test_mix_3-2"
    assert put({"tta": "none"}) == "test_mix_3"
    assert put({"tta": "flip_scale", "threshold": 0.4}) == "test_mix_3-3"
    assert put({"tta": "flip"}) == "test_mix_3-2"
    (folder / "inference.json").write_text("broken")
    assert place_for(folder, {"tta": "new"}) == folder
