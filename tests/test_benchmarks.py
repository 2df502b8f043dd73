"""The speed and memory benchmarks, run at tiny size: rows, ratios, JSON, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import inference, memory, prompt_rows, training
from benchmarks.subjects import RECIPES, SD35_TRANSFORMER, build_prompt, build_vae
from tests.conftest import ROOT
from utils.errors import InputError

SAMPLE = str(ROOT / "assets" / "glass_sample")
PLAIN = "folded, latent cache, no checkpointing, plain attention"
SMALL = [
    "--size",
    "tiny",
    "--resolution",
    "32",
    "--batch_size",
    "2",
    "--steps",
    "1",
    "--warmup",
    "1",
    "--data_type",
    "fp32",
]


@pytest.mark.slow
def test_training_rows_stand_beside_the_published_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "training.json"
    training.main([*SMALL, "--data", SAMPLE, "--out", str(out), "--only", "folded", "folded, latent cache", PLAIN])
    record = json.loads(out.read_text())
    assert [row["recipe"] for row in record["rows"]] == ["published", "folded", "folded, latent cache", PLAIN]
    published, folded, cached, _ = record["rows"]
    for row in record["rows"]:
        assert row["samples_per_second"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert set(row["shares"]) == {"data", "VAE", "transformer", "optimiser"}
        assert row["peak_memory_bytes"] is None
    # A cache spares both encodings; folding spares little of the arithmetic.
    assert cached["flops_per_update"] < folded["flops_per_update"] <= published["flops_per_update"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| published |")
    assert lines[1].split("|")[3].strip() == "1.00"
    assert record["machine"]["cores"] >= 1
    assert record["matrix_flops_per_second"] > 0


def test_inference_rows_stand_beside_the_published_way(tmp_path: Path) -> None:
    out = tmp_path / "inference.json"
    ways = [
        "batched",
        "batched, channels last, folded, without zero rows",
        "all of these, light mask decoder with features",
    ]
    inference.main([*SMALL, "--out", str(out), "--only", *ways])
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["published", *ways]
    assert all(row["images_per_second"] > 0 and row["flops_per_image"] > 0 for row in rows)


def test_ways_of_predicting_agree() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    predictions = []
    for way in (*inference.WAYS[:3], replace(inference.WAYS[0], name="folded", folded=True)):
        torch.manual_seed(0)
        predictions.append(inference.Inference(way, "tiny", torch.device("cpu"), torch.float32).predict(images))
    for prediction in predictions[1:]:
        torch.testing.assert_close(prediction, predictions[0], rtol=1e-3, atol=1e-3)


def test_memory_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="this machine has no GPU"):
        memory.main(SMALL)


def test_an_unknown_row_is_named() -> None:
    with pytest.raises(InputError, match="no recipe 'faster'; there are: published; "):
        training.chosen(["faster"], RECIPES, "recipe")
    with pytest.raises(InputError, match="no way 'faster'"):
        inference.main([*SMALL, "--only", "faster"])


@pytest.mark.parametrize("flag", ["--steps", "--warmup", "--batch_size"])
def test_counts_must_be_positive(flag: str) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        training.parse([flag, "0"], "", 4)


def test_sizes_are_the_true_ones() -> None:
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD35_TRANSFORMER)
    assert round(sum(parameter.numel() for parameter in transformer.parameters()) / 1e6) == 2243
    vae = build_vae("sd35-medium", torch.device("meta"), torch.float32)
    parts = [sum(parameter.numel() for parameter in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert [round(part / 1e6, 1) for part in parts] == [34.3, 49.5]
    rows = build_prompt("sd35-medium").prompt_embeds[0].abs().sum(dim=1)
    assert len(rows) == 154
    assert (rows == 0).sum() == 77


def test_recipes_have_names_of_their_own() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


def test_leaving_out_zero_rows_changes_the_answer_and_is_measured(
    base: Path, trans10k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    flags = ["--base_model_path", str(base), "--data", str(trans10k), "--resolution", "32", "--pictures", "3"]
    prompt_rows.main([*flags, "--out", str(out)])
    record = json.loads(out.read_text())
    assert (record["rows"], record["zero_rows"]) == (6, 3)
    assert 0 < record["relative_change"] < 1
    assert "3 of 6 rows left out change the prediction by" in capsys.readouterr().out
    with pytest.raises(InputError, match="--resolution a multiple of 16"):
        prompt_rows.main(["--resolution", "40"])
