"""The study trains and scores through the entry points, goes on where it stopped, and compares picture by picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import study
from models.base import load_transformer
from tests.conftest import arguments_of
from utils.errors import CommandError, InputError


def test_rows_compare_the_same_pictures() -> None:
    def record(a: float, b: float, seconds: float) -> dict[str, object]:
        return {"iou": {"b": b, "a": a}, "boundary_iou": {"a": a / 2, "b": b / 2}, "seconds": seconds}

    baseline = [record(0.2, 0.4, 60), record(0.4, 0.6, 60)]
    better = [record(0.3, 0.5, 90), record(0.5, 0.7, 150)]
    row = study.table_row("better", better, baseline)
    assert row["iou"] == pytest.approx(0.5)
    assert row["iou_by_seed"] == pytest.approx([0.4, 0.6])
    assert row["difference_interval"] == pytest.approx([0.1, 0.1])
    assert row["minutes"] == 2
    line = study.format_rows([row]).splitlines()[-1]
    assert line.startswith("| better | 0.5000 | ")
    assert line.endswith("| 0.400 0.600 | +0.1000 | +0.100 to +0.100 | 0.2500 | 2.0 |")


@pytest.mark.slow
def test_a_study_runs_its_variants_and_goes_on(
    flags: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    del flags["output_dir"]
    flags |= {"max_train_steps": 2, "save_checkpoint_steps": 1, "val_steps": 2, "latent_cache_variants": 1}
    arguments = ["--out", str(out), "--report", str(out), "--seeds", "1", "--only", "folded conditioning"]
    arguments += ["U-Net from scratch", *arguments_of(flags)]
    study.main(arguments)
    record = json.loads((out / "study.json").read_text())
    assert [row["variant"] for row in record["rows"]] == [
        "clean latents, both losses",
        "folded conditioning",
        "U-Net from scratch",
    ]
    assert record["rows"][0]["difference"] == 0
    assert study.format_rows(record["rows"]) in (out / "study.md").read_text()
    assert study.format_rows(record["rows"]) in capfd.readouterr().out
    assert (out / "study.svg").read_text().startswith("<?xml")
    config = json.loads(next(out.glob("folded*/seed-0/checkpoints/checkpoint-2/transformer/config.json")).read_text())
    assert config["_class_name"] == "FoldedSD3Transformer2DModel"

    # What is done is not done again, and a broken run is told.
    monkeypatch.setattr(study, "_run", lambda script, arguments: pytest.fail("ran again"))
    study.main(arguments)
    assert json.loads((out / "study.json").read_text())["rows"] == record["rows"]
    monkeypatch.undo()
    with pytest.raises(CommandError, match=r"trainer\.py failed with exit code 2"):
        study.main([*arguments, "--seeds", "2", "--lr", "-1"])


def test_results_of_other_flags_are_not_taken_for_these(tmp_path: Path) -> None:
    folder = tmp_path / "folded_conditioning" / "seed-0"
    folder.mkdir(parents=True)
    record = {"iou": {}, "boundary_iou": {}, "seconds": 1.0, "flags": ["--epochs", "5"]}
    (folder / "study.json").write_text(json.dumps(record))
    variant = next(variant for variant in study.VARIANTS if variant.name == "folded conditioning")
    assert study.train_and_score(variant, 0, tmp_path, ["--epochs", "5"]) == record
    with pytest.raises(InputError, match=r"was trained with the flags '--epochs 5', not ''; choose another --out"):
        study.train_and_score(variant, 0, tmp_path, [])


def test_a_base_with_random_weights_is_the_tiny_base_but_for_its_transformer(tmp_path: Path) -> None:
    folder = study.random_base(tmp_path / "base")
    tiny = study.ROOT / "assets" / "tiny_sd3"
    left, right = load_transformer(folder), load_transformer(tiny)
    assert {name: value.shape for name, value in left.state_dict().items()} == {
        name: value.shape for name, value in right.state_dict().items()
    }
    assert not left.proj_out.weight.equal(right.proj_out.weight)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / vae).read_bytes() == (tiny / vae).read_bytes()
    before = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    study.random_base(folder)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(InputError, match="no variant 'faster'; there are: clean latents"):
        study.main(["--only", "faster"])
    with pytest.raises(InputError, match="--seeds: 0 is not valid"):
        study.main(["--seeds", "0"])
