"""Handing a model on: exported folders, their model card, what is loaded from them and what is refused, the upload."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from models import pipeline as pipeline_module
from models.base import load_transformer
from models.card import model_card
from models.pipeline import TransparencySegmentationPipeline
from tests.conftest import RESOLUTION, environment, make_prompt
from tests.test_checkpoints import message_of, put_best, write_run
from utils.checkpoints import load_pipeline, read_config
from utils.errors import InputError
from utils.publishing import base_licence, describe_training, export, load_model, main

FIGURES = {"iou": 0.5, "recall": 0.6, "mse": 0.1, "boundary_iou": 0.2, "num_images": 5}


def assert_exported(out: Path, checkpoint: Path) -> None:
    """Checks that an exported folder gives the masks and carries the settings of its checkpoint."""
    loaded = TransparencySegmentationPipeline.from_pretrained(out)
    expected = load_pipeline(checkpoint, torch.float32)
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    output, wanted = loaded.predict(images), expected.predict(images)
    torch.testing.assert_close(output.predictions, wanted.predictions, atol=1e-5, rtol=0)
    assert torch.equal(output.masks, wanted.masks)
    config = read_config(checkpoint)
    for name in ("objective", "resolution", "threshold", "denoise_steps", "ensemble_size", "logit_mean"):
        assert loaded.config[name] == getattr(config, name), name
    assert loaded.config["codec"] == "binary"
    assert loaded.scheduler.config.shift == 3.0
    assert torch.equal(loaded.prompt.prompt_embeds, make_prompt().prompt_embeds)
    state_dict = load_transformer(checkpoint).state_dict()
    assert all(torch.equal(value, state_dict[name]) for name, value in loaded.transformer.state_dict().items())


@pytest.mark.parametrize("objective", ["end_to_end", "diffusion"])
def test_an_exported_checkpoint_loads_as_a_pipeline_with_its_settings(
    objective: str, base: Path, tmp_path: Path
) -> None:
    checkpoint = write_run(tmp_path / "run", base, objective)
    assert export(tmp_path / "run", tmp_path / "out") == checkpoint
    assert_exported(tmp_path / "out", checkpoint)


def test_the_command_exports_a_runs_best_or_a_checkpoints_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    best = write_run(run, base, step=3)
    put_best(run, best.name)
    write_run(run, base, step=5)
    for source, name, expected in ((run, "a", "checkpoint-3"), (run / "checkpoints" / "checkpoint-5", "b", None)):
        monkeypatch.setattr(sys, "argv", ["publishing", str(source), str(tmp_path / name)])
        main()
        checkpoint = run / "checkpoints" / expected if expected else source
        assert capsys.readouterr().out == f"{checkpoint} -> {tmp_path / name}\n"
        assert (tmp_path / name / "model_index.json").is_file()


def test_exporting_in_half_precision_writes_it(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", base)
    export(tmp_path / "run", tmp_path / "out", data_type="bf16")
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_an_occupied_folder_is_not_exported_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert (
        message_of(export, tmp_path, tmp_path / "out") == f"{tmp_path / 'out'}: exists already; choose another folder"
    )
    assert "exists already" in message_of(export, tmp_path, tmp_path / "out" / "mine")


def test_a_run_without_checkpoints_cannot_be_exported(tmp_path: Path) -> None:
    assert "holds no complete checkpoint" in message_of(export, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_tells_the_recipe_the_scores_and_the_licence(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "glass"
    checkpoint = write_run(run, base, step=3)
    for name, used in (("test_mix_3", "checkpoint-3"), ("test_mix_9", "checkpoint-9")):
        folder = run / "mask_predictions" / name
        folder.mkdir(parents=True)
        inference = {
            "checkpoint": f"{run}/checkpoints/{used}",
            "resolution": RESOLUTION,
            "tta": "none",
            "threshold": 0.4,
        }
        (folder / "inference.json").write_text(json.dumps(inference))
        (folder / "metrics.json").write_text(json.dumps(FIGURES))
    (run / "provenance.json").write_text('{"commit": "abc123"}')
    export(run, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert [result.metric_value for result in card.data.eval_results] == [0.5, 0.6, 0.1]
    assert "| test_mix | 5 | 32 | none | 0.4 | 0.5000 | 0.6000 | 0.1000 | 0.2000 |" in card.text
    assert "`abc123`" in card.text
    assert "- `resolution: 32`" in card.text
    assert str(tmp_path) not in card.content  # where things lie on one machine is nobody's business
    again = TransparencySegmentationPipeline.from_pretrained(tmp_path / "out")
    assert model_card(dict(again.config)) == card.content
    assert describe_training(checkpoint)["name"] == "glass"


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    assert base_licence("stabilityai/stable-diffusion-3.5-medium")["license_name"] == "stabilityai-ai-community"
    assert base_licence("assets/tiny_sd3") == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\nA base.")
    assert base_licence(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    (tmp_path / "README.md").write_text("No metadata.")
    assert (
        base_licence(str(tmp_path))
        == base_licence("somebody/model")
        == {"license": "other", "license_name": "as-the-base-model"}
    )


def test_a_model_is_a_run_a_checkpoint_or_an_exported_folder(base: Path, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", base)
    export(tmp_path / "run", tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    found = [load_model(str(path))(picture).soft[0] for path in (tmp_path / "run", checkpoint, tmp_path / "out")]
    assert np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)
    assert "holds no complete checkpoint" in message_of(load_model, str(tmp_path))
    assert "check model" in message_of(load_model, str(tmp_path / "gone"))


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_and_no_pickle_comes_from_a_folder(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", base)
    out = tmp_path / "out"
    export(tmp_path / "run", out)
    index = json.loads((out / "model_index.json").read_text())
    # The index may name any class of any module, and a folder may hold a module of its own.
    (out / "transformer" / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (out / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    index |= {"transformer": ["trap", "Trap"], "vae": ["os", "system"]}
    (out / "model_index.json").write_text(json.dumps(index))
    assert type(TransparencySegmentationPipeline.from_pretrained(out).transformer).__name__ == "SD3Transformer2DModel"
    weights = out / "vae" / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    weights.unlink()
    assert "weights must be safetensors" in message_of(TransparencySegmentationPipeline.from_pretrained, out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline"),
        ({"objective": "guessing"}, "guessing"),
        ({"palette": {"a": 1}}, "cannot be used"),
        ({"surprise": 1}, "surprise"),
        ({"objective": "diffusion"}, "objective diffusion needs 32 input channels, the transformer has 16"),
    ],
)
def test_a_folder_of_something_else_is_told(change: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", base)
    export(tmp_path / "run", tmp_path / "out")
    index = tmp_path / "out" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    message = message_of(TransparencySegmentationPipeline.from_pretrained, tmp_path / "out")
    assert message.startswith(f"{index}: ")
    assert said in message


def test_what_is_no_run_is_told_and_foreign_scores_are_left_out(base: Path, tmp_path: Path) -> None:
    assert "tiny_sd3: holds no complete checkpoint (a base model has to be fine-tuned first)" in message_of(
        load_model, "assets/tiny_sd3"
    )
    assert "nowhere: no such folder" in message_of(export, tmp_path / "nowhere", tmp_path / "out")
    checkpoint = write_run(tmp_path / "run", base)
    for number, (metrics, inference) in enumerate(
        (({}, {}), ({"iou": "x"}, {"checkpoint": 5, "threshold": "high"}), ({"iou": 1e999}, {"checkpoint": None}))
    ):
        folder = tmp_path / "run" / "mask_predictions" / f"test_mix_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(
            json.dumps({"recall": 1, "mse": 0, "boundary_iou": 1, "num_images": 1} | metrics)
        )
        (folder / "inference.json").write_text(
            json.dumps({"resolution": 64, "tta": "none", "threshold": 0.5} | inference)
        )
    assert describe_training(checkpoint)["scores"] == []
    export(tmp_path / "run", tmp_path / "out")
    assert "exported already" in message_of(export, tmp_path / "out", tmp_path / "again")


def test_pushing_uploads_the_folder_with_its_card(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
            calls.append((repo_id, names, (Path(folder_path) / "README.md").read_text(), commit_message))

    monkeypatch.setattr(pipeline_module, "HfApi", Hub)
    write_run(tmp_path / "run", base)
    monkeypatch.setattr(
        sys, "argv", ["publishing", str(tmp_path / "run"), str(tmp_path / "out"), "--push", "me/glass", "--private"]
    )
    main()
    token, created, (repo_id, names, card, _) = calls
    assert (token, created, repo_id) == (None, ("me/glass", True, True), "me/glass")
    assert names == {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert card == (tmp_path / "out" / "README.md").read_text()


def test_a_failed_upload_keeps_the_folder_and_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(token: str | None) -> None:
        raise OSError("no route")

    monkeypatch.setattr(pipeline_module, "HfApi", fail)
    write_run(tmp_path / "run", base)
    monkeypatch.setattr(sys, "argv", ["publishing", str(tmp_path / "run"), str(tmp_path / "out"), "--push", "me/glass"])
    with pytest.raises(InputError, match=r"--push me/glass: not uploaded \(no route\)"):
        main()
    assert (tmp_path / "out" / "model_index.json").is_file()


ELSEWHERE = """
import sys
import numpy as np
from models.pipeline import TransparencySegmentationPipeline
pipe = TransparencySegmentationPipeline.from_pretrained("moved")
np.save("soft.npy", pipe("photo.png").soft[0])
"""


def test_an_exported_folder_needs_nothing_at_a_particular_place(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", base)
    export(tmp_path / "run", tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = TransparencySegmentationPipeline.from_pretrained(tmp_path / "out")(picture).soft[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "moved")
    (tmp_path / "run").rename(tmp_path / "gone")
    Image.fromarray(picture).save(tmp_path / "elsewhere" / "photo.png")
    here = {**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())}  # threads decide in which order is added
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=here, capture_output=True, text=True, cwd=tmp_path / "elsewhere", timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "elsewhere" / "soft.npy"), expected)
