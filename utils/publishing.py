"""Hands a trained model on: a run, a checkpoint or a folder as a pipeline; a pipeline as a folder, or on the hub.

`python -m utils.publishing RUN OUT` writes a checkpoint as a folder that needs nothing but the requirements and this package,
its adapters merged, with a model card filled from the run; `--push OWNER/NAME` uploads it too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from models.attention import use_plain_attention
from models.base import DTYPES
from models.card import STABILITY_LICENCE, UNKNOWN_LICENCE
from models.pipeline import INDEX_FILE_NAME, TransparencySegmentationPipeline
from utils.checkpoints import (
    STATE_FILE_NAME,
    best_or_latest,
    find_checkpoint,
    list_checkpoints,
    load_pipeline,
    read_config,
    read_state,
)
from utils.config import Config
from utils.errors import InputError, first_line, run_command

# Where things lie on one machine, and how fast they were read there, says nothing about the model.
PRIVATE_KEYS = (
    "base_model_path", "prompt_embeds_path", "mask_decoder_path", "dataset_path", "palette", "latent_cache_path", "output_dir",
    "resume_from_checkpoint", "tracker", "dataloader_num_workers", "load_checkpoint", "test_difficulty", "num_vals_test",
)  # fmt: skip
HUB_OWNER = "stabilityai/"


def load_model(model: str, dtype: torch.dtype = torch.float32) -> TransparencySegmentationPipeline:
    """Loads what a user may call a model.

    Args:
        model: folder of a run (its best checkpoint, else its latest), a checkpoint, an exported folder, or a hub id.
        dtype: of the weights.

    Raises:
        InputError: if it is none of these, or broken.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / INDEX_FILE_NAME).is_file():
        return load_pipeline(_checkpoint_of(folder), dtype)
    return TransparencySegmentationPipeline.from_pretrained(model, torch_dtype=dtype)


def load_model_on(model: str, device: torch.device, data_type: str | None = None) -> TransparencySegmentationPipeline:
    """Loads a model as `load_model` does, onto the device that will compute.

    Args:
        model: see `load_model`.
        device: to compute on.
        data_type: key of `DTYPES`; None: `usual_data_type`.
    """
    pipeline = load_model(model, DTYPES[data_type or usual_data_type(device)]).to(device)
    if device.type == "cpu":
        use_plain_attention(pipeline.transformer)
    return pipeline


def usual_data_type(device: torch.device) -> str:
    """Returns the precision that a model is used in where nobody names one."""
    return "bf16" if device.type == "cuda" else "fp32"


def describe_training(checkpoint: Path) -> dict[str, Any]:
    """Returns what a model card tells of a checkpoint, as JSON takes it: base, licence, data, recipe, commit, and the scores that
    inferences with this checkpoint left in its run's folder.
    """
    run, config, state = checkpoint.parent.parent, read_config(checkpoint), read_state(checkpoint)
    defaults = asdict(Config())
    recipe = {
        name: value for name, value in asdict(config).items() if name not in PRIVATE_KEYS and value != defaults[name]
    }
    on_hub = not Path(config.base_model_path).expanduser().exists()
    return {
        "name": run.resolve().name,
        "base_model": config.base_model_path if on_hub else Path(config.base_model_path).name,
        "base_on_hub": on_hub,
        "licence": base_licence(config.base_model_path),
        "data": Path(config.dataset_path).name,
        "layout": config.dataset_name,
        "updates": state.global_step,
        "recipe": recipe,
        "commit": _read_json(run / "provenance.json").get("commit"),
        "scores": _scores(run, checkpoint.name, Path(config.dataset_path).name),
    }


def base_licence(base_model_path: str) -> dict[str, str]:
    """Returns a base's licence as the hub's metadata name it, from its own card where it has one."""
    card = Path(base_model_path).expanduser() / "README.md"
    if card.is_file():
        try:
            data = ModelCard.load(card).data.to_dict()
        except (ValueError, OSError):
            data = {}
        found = {name: str(data[name]) for name in ("license", "license_name", "license_link") if data.get(name)}
        return found if "license" in found else UNKNOWN_LICENCE
    return STABILITY_LICENCE if base_model_path.startswith(HUB_OWNER) else UNKNOWN_LICENCE


def export(run: Path, out: Path, name: str = "best", data_type: str = "fp32") -> Path:
    """Turns a checkpoint into a pipeline folder that `TransparencySegmentationPipeline.from_pretrained` loads.

    Args:
        run: a run's folder, or a checkpoint's.
        out: folder to write; must not exist or be empty.
        name: latest, best or a checkpoint's name; ignored if `run` is a checkpoint.
        data_type: of the exported weights.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: if the checkpoint is missing, or `out` is occupied or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; choose another folder")
    checkpoint = _checkpoint_of(run, name)
    pipeline = load_pipeline(checkpoint, DTYPES[data_type])
    pipeline.register_to_config(training=describe_training(checkpoint))
    partial = out.with_name(f".part-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{out}: cannot be written ({first_line(error)}); check the disk") from error
    return checkpoint


def _checkpoint_of(run: Path, name: str = "best") -> Path:
    if (run / STATE_FILE_NAME).is_file():
        return run
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; name a run that trainer.py wrote, or one of its checkpoints")
    if (run / INDEX_FILE_NAME).is_file():
        raise InputError(f"{run}: is exported already; use it as it is, or copy it")
    if not list_checkpoints(run):
        base = " (a base model has to be fine-tuned first)" if (run / "transformer").is_dir() else ""
        raise InputError(
            f"{run}: holds no complete checkpoint{base}; name a run that trainer.py wrote, one of its checkpoints, or an exported folder"
        )
    return find_checkpoint(run, best_or_latest(run) if name == "best" else name, "MODEL")


def _scores(run: Path, checkpoint_name: str, data: str) -> list[dict[str, Any]]:
    found = []
    for folder in sorted((run / "mask_predictions").glob("test_*")):
        inference, metrics = (_read_json(folder / name) for name in ("inference.json", "metrics.json"))
        try:
            figures = {key: float(metrics[key]) for key in ("iou", "recall", "mse", "boundary_iou")}
            settings = {"resolution": int(inference["resolution"]), "tta": str(inference["tta"])}
            settings |= {"threshold": float(inference["threshold"]), "pictures": int(metrics["num_images"])}
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # of an earlier version, or not whole
        if Path(str(inference.get("checkpoint", ""))).name == checkpoint_name:
            scored_on = Path(str(inference.get("dataset_path", data))).name
            found.append({"split": "_".join(folder.name.split("_")[:2]), "data": scored_on, **settings, **figures})
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def main() -> None:
    """Command line: `RUN OUT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint's")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--checkpoint", default="best", help="latest, best or a name [default: best, else latest]")
    parser.add_argument("--data_type", choices=sorted(DTYPES), default="fp32", help="precision of the weights")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to the hub (log in with `hf auth login`)"
    )
    parser.add_argument("--private", action="store_true", help="a new repository on the hub is private")
    arguments = parser.parse_args()
    checkpoint = export(arguments.run, arguments.out, arguments.checkpoint, arguments.data_type)
    print(f"{checkpoint} -> {arguments.out}")
    if arguments.push:
        try:
            dtype = DTYPES[arguments.data_type]
            pipeline = TransparencySegmentationPipeline.from_pretrained(arguments.out, torch_dtype=dtype)
            address = pipeline.push_to_hub(arguments.push, private=arguments.private or None)
        except Exception as error:  # the hub, the network and the login fail in many ways
            raise InputError(
                f"--push {arguments.push}: not uploaded ({first_line(error)}); the folder {arguments.out} is written. Log in with "
                "`hf auth login`, then: hf upload OWNER/NAME FOLDER"
            ) from error
        print(f"uploaded: {address}")


if __name__ == "__main__":
    run_command(main)
