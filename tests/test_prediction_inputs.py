"""What users name to be predicted, and the names that outputs get."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.prediction_inputs import Source, find_files, name_files
from utils.prediction_record import PredictionRecord


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_of(sources: list[Source]) -> list[str]:
    return [source.name for source in sources]


def find(folder: Path, *inputs: str, recursive: bool = False, lists: tuple[Path, ...] = ()) -> list[Source]:
    return name_files(find_files([str(folder / entry) for entry in inputs], lists, recursive, folder / "out"), {})


def test_a_folders_pictures_and_videos_are_found_sorted_without_hidden_ones(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", ".hidden.png", "notes.txt", "film.MP4", "deep/c.webp", ".git/d.png", "out/e.png")
    assert names_of(find(tmp_path, ".")) == ["a", "b", "film"]
    found = find(tmp_path, ".", recursive=True)
    assert names_of(found) == ["a", "b", "deep/c", "film"]
    assert [source.is_video for source in found] == [False, False, False, True]


def test_what_a_folder_holds_beside_pictures_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/b.HEIC", "in/c.heic", "in/README", "in/.hidden.txt", "in/deep/d.txt", "other/e.png")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    told: list[str] = []
    for recursive in (False, True):
        found = find_files([str(tmp_path / "in")], (), recursive, tmp_path / "out", told.append)
        assert [path.name for path, _ in found] == ["a.png"]
    kinds = "2 .heic, {}2 broken links or special files, {}1 without ending"
    said = f"{tmp_path / 'in'}: left out what is no picture or video: "
    assert told == [said + kinds.format("", ""), said + kinds.format("1 .txt, ", "1 linked folders, ")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "secret/b.png")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # whoever runs the tests may be allowed to read all
    with pytest.raises(InputError, match=r"secret: cannot be read \(Permission denied\)"):
        find(tmp_path, ".", recursive=True)
    assert names_of(find(tmp_path, ".")) == ["a"]


def test_earlier_predictions_are_no_inputs_of_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/a_mask.png", "out/deep/b_mask.png")
    assert names_of(find(tmp_path, "**/*.png")) == ["a"]


def test_names_never_collide_not_even_in_their_case(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.png", "one/a.jpg", "two/A.png", "three/a_png.png", "three/a.png")
    found = find(tmp_path, "one/a.png", "one/a.jpg", "two/A.png", "three/a_png.png", "three/a.png", "one/a.png")
    names = names_of(found)
    assert names[:2] == ["a", "a_jpg"]
    assert len(names) == len({name.lower() for name in names}) == 5


def test_long_names_leave_room_for_what_outputs_are_called(tmp_path: Path) -> None:
    names = ["x" * 250 + ".png", "x" * 251 + ".png", "ü" * 120 + ".png"]
    touch(tmp_path, *names, f"deep/{names[0]}")
    found = names_of(find(tmp_path, ".", recursive=True))
    assert len(set(found)) == 4
    assert all(len(name.rpartition("/")[2].encode()) < 220 for name in found)
    assert f"deep/{'x' * 200}" in found


def test_patterns_and_lists_name_files_and_repeats_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "deep/b.png", "deep/er/c.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'a.png'}\n\n  {tmp_path / 'deep' / '*.png'}  \n")
    assert names_of(find(tmp_path, "**/*.png")) == ["a", "b", "c"]
    assert names_of(find(tmp_path, lists=(tmp_path / "list.txt",))) == ["a", "b"]
    assert names_of(find(tmp_path, "a.png", "*.png", lists=(tmp_path / "list.txt",))) == ["a", "b"]


def test_a_listed_file_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'gone.png'}\n{tmp_path / 'a.png'}\n")
    assert names_of(find(tmp_path, lists=(tmp_path / "list.txt",))) == ["gone", "a"]


def test_names_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.png", "two/a.png")
    second = str(tmp_path / "two" / "a.png")
    named = {second: "a"}
    found = name_files(find_files([str(tmp_path / "one" / "a.png"), second], (), False, tmp_path / "out"), named)
    assert names_of(found) == ["a_png", "a"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [("gone.png", "no such file"), ("*.bmp", "no file matches"), ("empty", "holds no pictures or videos; --recursive")],
)
def test_an_input_that_is_nothing_is_named(entry: str, said: str, tmp_path: Path) -> None:
    touch(tmp_path, "empty/deeper/a.png")
    with pytest.raises(InputError) as caught:
        find(tmp_path, entry)
    assert str(caught.value).startswith(f"{tmp_path / entry}: {said}")


def test_without_any_input_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        find(tmp_path)
    with pytest.raises(InputError, match=r"gone.txt: cannot be read as a list"):
        find(tmp_path, lists=(tmp_path / "gone.txt",))


SETTINGS = {"threshold": 0.5}


def release(record: PredictionRecord) -> None:
    """Ends a run."""
    record._running.close()


def predicted(tmp_path: Path, overwrite: bool = False, **settings: object) -> PredictionRecord:
    return PredictionRecord(tmp_path / "out", {**SETTINGS, **settings}, overwrite)


def test_a_record_knows_what_is_done_until_the_file_or_its_outputs_change(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    first, second = Source(tmp_path / "a.png", "a"), Source(tmp_path / "b.png", "b")
    record = predicted(tmp_path)
    for source in (first, second):
        record.start(source, [f"{source.name}_mask.png"])
        touch(tmp_path / "out", f"{source.name}_mask.png")
    record.finish(first, ["a_mask.png"], share=0.5)
    record.fail(second, "broken")
    release(record)
    again = predicted(tmp_path)
    assert again.is_done(first)
    assert [entry["share"] for entry in again.finished()] == [0.5]
    assert not again.is_done(second)
    again.start(second, ["b_mask.png"])  # what a kill left is this list's own
    (tmp_path / "a.png").write_text("other")
    assert not again.is_done(first)
    touch(tmp_path, "a.png")
    (tmp_path / "out" / "a_mask.png").unlink()
    release(again)
    assert not predicted(tmp_path).is_done(first)


def test_a_strangers_file_is_not_overwritten(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/a_mask.png")
    source = Source(tmp_path / "a.png", "a")
    for _ in range(2):  # refused once is refused for good
        record = predicted(tmp_path)
        with pytest.raises(InputError, match=r"a_mask.png: exists already and is not of this list"):
            record.start(source, ["a_mask.png"])
        record.fail(source, "refused")
        release(record)
    predicted(tmp_path, overwrite=True).start(source, ["a_mask.png"])


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/a_mask.png")
    source = Source(tmp_path / "a.png", "a")
    record = predicted(tmp_path, overwrite=True)
    record.finish(source, ["a_mask.png"])
    with record.path.open("a") as file:
        file.write('{"input": "/half')
    release(record)
    assert predicted(tmp_path).is_done(source)
    assert all(json.loads(line) for line in record.path.read_text().splitlines())


def test_other_settings_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    release(predicted(tmp_path))
    with pytest.raises(InputError, match=r"other settings \(threshold 0.5, now 0.4\)"):
        predicted(tmp_path, threshold=0.4)
    release(predicted(tmp_path, overwrite=True, threshold=0.4))
    for content in (
        "[]\n",
        "not json\n",
        '{"settings": 5}\n',
        '{"settings": {}}\n{"input": "a", "name": "../a"}\n',
        '{"settings": {"threshold": 0.5}}\n{"input": 1}\n',
    ):
        (tmp_path / "out" / "predictions.jsonl").write_text(content)
        with pytest.raises(InputError, match="is no list of predictions"):
            predicted(tmp_path)


def test_one_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    first = predicted(tmp_path)
    with pytest.raises(InputError, match="another run writes into it"):
        predicted(tmp_path)
    release(first)
    predicted(tmp_path)


def test_an_output_folder_that_holds_the_inputs_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "out/a.png", "out/deep/b.png")
    with pytest.raises(InputError, match="holds the inputs"):
        find(tmp_path, "out")
    assert names_of(find(tmp_path, "out/deep")) == ["b"]
