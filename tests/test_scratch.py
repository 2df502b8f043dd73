from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.scratch import SegFormer, UNet, main
from utils.errors import InputError


def test_has_about_1_2_million_parameters() -> None:
    assert sum(parameter.numel() for parameter in UNet().parameters()) == pytest.approx(1.2e6, rel=0.05)


@pytest.mark.parametrize("size", [(32, 32), (48, 16), (37, 21)])
def test_one_logit_for_each_pixel(size: tuple[int, int]) -> None:
    assert UNet((8, 8, 16, 16))(torch.rand(2, 3, *size)).shape == (2, *size)


def test_segformer_has_the_size_of_b0_and_one_logit_for_each_pixel() -> None:
    model = SegFormer()
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(3.7e6, rel=0.05)
    assert model(torch.rand(2, 3, 48, 32)).shape == (2, 48, 32)


def test_run_writes_its_scores(
    trans10k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = itertools.count()  # a clock on which every update takes 50 ms
    monkeypatch.setattr("benchmarks.scratch.time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.05))
    out = tmp_path / "results" / "unet.json"
    flags = f"--data {trans10k} --resolution 32 --batch_size 4 --minutes 0.025 --threshold validation --out {out}"
    main(shlex.split(flags))
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["command"] == f"python -m benchmarks.scratch {flags}"
    assert record["minutes"] >= 0.025
    assert len(record["pictures"]) == 10
    assert 0 < record["threshold"] < 1
    assert record["pictures_seen"] == 29 * 4
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert (record["validation"]["num_images"], record["scores"]["num_images"]) == (6, 10)
    for scores in (record["validation"], record["scores"], record["scores"]["easy"], record["scores"]["hard"]):
        assert all(0 <= scores[column] <= 1 for column in ("iou", "recall", "mse"))
    # The fixture's glass is a bright rectangle; weights that learnt nothing stay below this.
    assert record["scores"]["iou"] > 0.3
    assert f"{record['scores']['iou']:.4f}" in capsys.readouterr().out


def test_out_is_checked_before_training(trans10k: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/unet\.json cannot be written"):
        main(["--data", str(trans10k), "--out", str(tmp_path / "file" / "unet.json")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "nan"], "--minutes: nan is not valid"),
        (["--resolution", "40"], "--resolution: '40' is not valid"),
        (["--dataset_name", "trans10k_classes"], "--dataset_name: these networks tell glass or not"),
        (["--data", "nowhere"], "nowhere: no such data set folder"),
        (["--batch_size", "0"], "--batch_size: '0' is not valid"),
        (["--augmentation", "maybe"], "--augmentation: 'maybe' is not valid"),
    ],
)
def test_bad_input_is_named_before_training(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        main(flags)
