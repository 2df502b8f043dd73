"""Two runs are compared on the same pictures, with an interval that deserves its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from utils import compare
from utils.errors import InputError

HEADER = "name,difficulty,iou,recall,mse\n"


def write(folder: Path, rows: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "per_image.csv").write_text(HEADER + rows)
    return folder


def test_the_interval_of_equal_scores_is_their_value_and_it_narrows_with_pictures() -> None:
    assert compare.interval(np.full((3, 5), 0.25)) == (0.25, 0.25)
    rng = np.random.default_rng(1)
    widths = []
    for pictures in (20, 500):
        low, high = compare.interval(rng.random((3, pictures)))
        assert low < 0.5 < high
        widths.append(high - low)
    # The standard error of a uniform variable's mean over 60 draws at least: 2 * 1.96 * sqrt(1 / 12 / 60).
    assert widths[0] > 0.146
    assert widths[1] < 0.1


def test_a_comparison_counted_by_hand(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "1,easy,0.5,0.5,0.3\n1,hard,0.4,0.5,0.3\n2,hard,0.2,0.5,0.1\n")
    b = write(tmp_path / "b", "2,hard,0.8,0.5,0.2\n1,hard,0.3,0.5,0.1\n1,easy,0.6,0.5,0.1\n")
    result = compare.compare(a / "per_image.csv", b / "per_image.csv")
    assert result["num_images"] == 3
    iou, mse = result["iou"], result["mse"]
    assert (iou["a"], iou["b"], iou["difference"]) == pytest.approx((1.1 / 3, 1.7 / 3, 0.2))
    assert (iou["won"], iou["lost"], iou["tied"]) == (2, 1, 0)
    assert (mse["won"], mse["lost"], mse["tied"]) == (2, 1, 0)  # the smaller error wins
    assert result["recall"]["tied"] == 3
    assert result["recall"]["interval"] == [0, 0]
    low, high = iou["interval"]
    assert -0.1 - 1e-9 <= low < 0.2 < high <= 0.6 + 1e-9


def test_the_command_finds_a_runs_only_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "run" / "mask_predictions" / "test_mix_6", "1,,0.5,0.5,0.3\n").parent.parent
    b = write(tmp_path / "b", "1,,0.75,0.5,0.3\n")
    monkeypatch.setattr(sys, "argv", ["compare", str(a), str(b)])
    compare.main()
    assert "iou           0.5000  0.7500  +0.2500 +0.2500 to +0.2500     1     0     0" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare", str(a), str(b), "--json"])
    compare.main()
    assert json.loads(capsys.readouterr().out)["iou"]["won"] == 1


def test_bad_input_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good", "1,,0.5,0.5,0.3\n") / "per_image.csv"
    other = write(tmp_path / "other", "2,,0.5,0.5,0.3\n") / "per_image.csv"
    with pytest.raises(InputError, match=r"score different pictures, 2 stand in one alone, /1 among them"):
        compare.compare(good, other)
    with pytest.raises(
        InputError, match=r"name one folder of predictions that val_inference\.py wrote \(there: none\)"
    ):
        compare.find_scores(tmp_path / "nothing")
    for number, rows in enumerate(
        ("1,,half,0.5,0.3\n", "1,,0.5\n", "", "1,,0.5,0.5,0.3\n1,,0.5,0.5,0.3\n", "1,,nan,0.5,0.3\n", "1,,55,0.5,0.3\n")
    ):
        bad = write(tmp_path / f"bad{number}", rows) / "per_image.csv"
        with pytest.raises(InputError, match=f"bad{number}"):
            compare.read_scores(bad)
