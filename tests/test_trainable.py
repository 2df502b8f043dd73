"""Every way of training resumes exactly, is scored, and is exported as a pipeline that needs nothing beside it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.base import load_transformer
from models.folding import fold
from models.lora import add_lora
from models.pipeline import TransparencySegmentationPipeline
from models.trainable import build_trainable, check_settings, load_trained
from tests.conftest import Launch, make_prompt, make_transformer, make_vae
from tests.test_training import WEIGHTS
from utils.checkpoints import load_pipeline
from utils.config import Config
from utils.errors import InputError
from utils.history import read_history
from utils.publishing import export

WAYS: dict[str, dict[str, object]] = {
    "folded": {"fold_conditioning": "true"},
    "average": {"ema_decay": 0.9},
    "adapters": {"trainable": "lora", "lora_rank": 4},
    "diffusion adapters": {"trainable": "lora", "objective": "diffusion"},
    "folded average": {"fold_conditioning": "true", "ema_decay": 0.9},
}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint by file and name."""
    return {
        f"{path.relative_to(checkpoint)}: {name}": value
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


# Compiled models, and torchao's compiled step: a minute each.
COMPILED_WAYS: dict[str, dict[str, object]] = {
    "compiled": {"compile": "true"},
    "bf16 weights": {"weights": "bf16"},
    "8-bit moments": {"optimizer": "adamw_8bit", "adam_epsilon": 1e-6},
    "averaged bf16 weights": {"weights": "bf16", "ema_decay": 0.9},
    "folded bf16 weights, 8-bit moments": {
        "fold_conditioning": "true",
        "weights": "bf16",
        "optimizer": "adamw_8bit",
        "adam_epsilon": 1e-6,
    },
}


SLOW_WAYS = {*COMPILED_WAYS, "average", "diffusion adapters", "folded average"}  # the last are near to ways that stay


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow if way in SLOW_WAYS else ()) for way in (*WAYS, *COMPILED_WAYS)],
)
def test_each_way_resumes_exactly_is_scored_and_exported(
    way: str, flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    if "adapters" in way:
        pytest.importorskip("peft")
    if way in COMPILED_WAYS and way != "compiled":
        pytest.importorskip("torchao")
    flags |= {**WAYS, **COMPILED_WAYS}[way] | {"val_steps": 3}
    launch("trainer.py", flags)
    whole, parts = tmp_path / "run", tmp_path / "parts"
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", parts / "checkpoints" / "checkpoint-3")
    launch("trainer.py", {**flags, "output_dir": parts, "resume_from_checkpoint": "latest"})
    left, right = (tensors_of(run / "checkpoints" / "checkpoint-6") for run in (whole, parts))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)

    done = launch("val_inference.py", {**flags, "load_checkpoint": "checkpoint-6"})
    assert "mix" in done.stdout
    validated = [float(row["val_iou"]) for row in read_history(whole / "history.csv") if row["val_iou"]]
    assert len(validated) == 2
    best = json.loads((whole / "checkpoints" / "best.json").read_text())
    assert best["iou"] == max(validated)

    checkpoint = export(whole, tmp_path / "exported", name="checkpoint-6")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_pipeline(checkpoint, torch.float32).predict(images)
    found = TransparencySegmentationPipeline.from_pretrained(tmp_path / "exported").predict(images)
    tolerance = 1e-5 if "adapters" in way else 0  # merged weights lie in memory otherwise than loaded ones
    torch.testing.assert_close(found.predictions, expected.predictions, rtol=tolerance, atol=tolerance)


def test_the_average_is_what_a_checkpoint_shows(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    launch("trainer.py", flags)
    launch("trainer.py", {**flags, "ema_decay": 0.9, "output_dir": tmp_path / "average"})
    plain, average = (tmp_path / run / "checkpoints" / "checkpoint-6" for run in ("run", "average"))
    raw, shown, trained = (
        load_file(path) for path in (average / "raw_weights.safetensors", average / WEIGHTS, plain / WEIGHTS)
    )
    assert all(raw[name].equal(trained[name]) for name in raw)  # averaging does not change the training
    assert any(not raw[name].equal(shown[name]) for name in raw)


@pytest.mark.slow
def test_an_average_left_out_on_resuming_leaves_the_weights_behind_it(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    launch("trainer.py", flags)
    launch("trainer.py", {**flags, "ema_decay": 0.9, "output_dir": tmp_path / "average", "max_train_steps": 3})
    launch("trainer.py", {**flags, "output_dir": tmp_path / "average", "resume_from_checkpoint": "latest"})
    plain, resumed = (
        load_file(tmp_path / run / "checkpoints" / "checkpoint-6" / WEIGHTS) for run in ("run", "average")
    )
    assert all(resumed[name].equal(plain[name]) for name in plain)


def test_validation_chooses_the_threshold_of_the_best_checkpoint(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"threshold": "validation", "val_steps": 3, "checkpoints_total_limit": 2}
    launch("trainer.py", flags)
    run = tmp_path / "run"
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert 0 < best["threshold"] < 1
    launch("val_inference.py", {**flags, "load_checkpoint": "best"})
    record = json.loads((run / "mask_predictions" / f"test_mix_{best['global_step']}" / "inference.json").read_text())
    assert record["threshold"] == best["threshold"]
    other = f"checkpoint-{9 - best['global_step']}"
    done = launch("val_inference.py", {**flags, "load_checkpoint": other}, check=2)
    assert f"threshold: validation chooses one for the best checkpoint alone, {other} is not" in done.stderr
    export(run, tmp_path / "exported")
    assert TransparencySegmentationPipeline.from_pretrained(tmp_path / "exported").config.threshold == best["threshold"]


def test_folded_training_starts_from_the_same_loss(flags: dict[str, object], launch: Launch, tmp_path: Path) -> None:
    flags |= {"max_train_steps": 3, "val_steps": "null"}
    launch("trainer.py", flags)
    launch("trainer.py", {**flags, "fold_conditioning": "true", "output_dir": tmp_path / "folded"})
    whole, folded = (read_history(tmp_path / run / "history.csv") for run in ("run", "folded"))
    assert float(folded[0]["loss"]) == pytest.approx(float(whole[0]["loss"]), rel=1e-5)
    config = json.loads(
        (tmp_path / "folded" / "checkpoints" / "checkpoint-3" / "transformer" / "config.json").read_text()
    )
    assert config["_class_name"] == "FoldedSD3Transformer2DModel"


def test_dropped_rows_stay_dropped_at_inference(
    base: Path, flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    from models.prompt import EmptyPrompt

    prompt = make_prompt()
    rows = torch.cat([prompt.prompt_embeds.data, torch.zeros(1, 4, 32)], dim=1)
    EmptyPrompt.from_tensors(rows, prompt.pooled_prompt_embeds.data).save_file(tmp_path / "prompt.safetensors")
    flags |= {"prompt_embeds_path": tmp_path / "prompt.safetensors", "max_train_steps": 3, "val_steps": "null"}
    launch("trainer.py", {**flags, "drop_zero_prompt_rows": "true"})
    stored = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-3" / "empty_prompt.safetensors")
    assert stored["prompt_embeds"].equal(prompt.prompt_embeds.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fold_conditioning": True, "objective": "diffusion"},
            "fold_conditioning: objective: diffusion has a timestep",
        ),
        (
            {"fold_conditioning": True, "trainable": "lora"},
            "fold_conditioning: trainable: lora keeps the base's layers",
        ),
        (
            {"optimizer": "adamw_8bit", "adam_epsilon": 1e-15},
            "optimizer: adamw_8bit rounds small second moments to 0.* set adam_epsilon to 1e-06",
        ),
        ({"weights": "bf16", "data_type": "fp16"}, "weights: bf16 does not go with data_type: fp16"),
    ],
)
def test_settings_at_odds_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(replace(Config(), **changes))


def test_adapters_without_their_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"trainable: lora needs peft; pip install -r requirements-memory.txt"):
        add_lora(make_transformer(), 4, Config().lora_targets)


def test_weights_in_bf16_keep_folded_vectors_in_fp32(base: Path) -> None:
    config = replace(Config(), resolution=32, weights="bf16", fold_conditioning=True)
    dtypes = {
        name: value.dtype
        for name, value in build_trainable(config, base, None, make_prompt(), make_vae()).named_parameters()
    }
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if name.endswith(".vector") or ".rows." in name}


def test_folded_vectors_stay_in_fp32_when_a_checkpoint_is_loaded_in_half_precision(tmp_path: Path) -> None:
    fold(make_transformer(), make_prompt(), 1000.0).save_pretrained(tmp_path / "transformer")
    loaded = load_transformer(tmp_path, torch.bfloat16)
    kept = {name for name, value in loaded.named_parameters() if value.dtype == torch.float32}
    assert kept == {name for name, _ in loaded.named_parameters() if name.endswith(".vector") or ".rows." in name}


@pytest.mark.parametrize(
    "change",
    [
        {"fold_conditioning": "true"},
        pytest.param({"trainable": "lora"}, marks=pytest.mark.slow),
        pytest.param({"drop_zero_prompt_rows": "true"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_not_resumed_another_way(change: dict[str, object], flags: dict[str, object], launch: Launch) -> None:
    flags |= {"max_train_steps": 3, "val_steps": "null"}
    launch("trainer.py", flags)
    done = launch("trainer.py", {**flags, **change, "resume_from_checkpoint": "latest", "max_train_steps": 6}, check=2)
    (name,) = change
    assert f"was trained with {name}: " in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.slow
def test_a_run_is_resumed_with_another_optimiser_which_starts_fresh(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"max_train_steps": 3, "val_steps": "null"}
    launch("trainer.py", flags)
    # As if it had been trained in bf16, which needs a library that is not in the tests' environment.
    config = tmp_path / "run" / "checkpoints" / "checkpoint-3" / "config.yaml"
    config.write_text(config.read_text().replace("weights: fp32", "weights: bf16"))
    done = launch("trainer.py", {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 6})
    assert "the optimiser starts fresh, its state was written by optimizer: adamw with weights: bf16" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-6").is_dir()


def test_adapters_need_their_base(flags: dict[str, object], launch: Launch, tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    launch(
        "trainer.py", {**flags, "base_model_path": copy, "trainable": "lora", "max_train_steps": 3, "val_steps": "null"}
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    assert not (checkpoint / "transformer").exists()
    shutil.rmtree(copy / "transformer")
    with pytest.raises(InputError, match="transformer missing"):
        load_pipeline(checkpoint, torch.float32)
    config = replace(Config(), trainable="lora")
    with pytest.raises(InputError):
        load_trained(config, copy, checkpoint, torch.float32)
