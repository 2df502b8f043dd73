"""Checkpoints: written beside and renamed when whole, found by name, rotated.

A checkpoint is a folder `checkpoint-<global_step>` with `transformer/` (Diffusers, safetensors) or `adapter/` (peft),
`mask_decoder/` where one is trained, `palette.json` where masks tell classes, `empty_prompt.safetensors`, `config.yaml`, `training_state.json` and the optimiser's state: `optimizer.safetensors`, or an
engine's own shards under `engine/`, which are read on explicit resume only. Where a moving average is kept, `transformer/`
shows it, and `raw_weights.safetensors` and `average.safetensors` are there to go on from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from dataset.codecs import Palette
from dataset.trans10k import layout_of
from models.base import (
    MASK_DECODER,
    PROMPT_FILE_NAME,
    check_prompt,
    check_resolution,
    load_scheduler,
    load_vae,
    resolve_base,
)
from models.lora import has_lora, save_lora
from models.mask_decoder import LightMaskDecoder, load_mask_decoder
from models.pipeline import TransparencySegmentationPipeline
from models.prompt import EmptyPrompt
from models.trainable import (
    ADAPTER_FOLDER_NAME,
    compile_blocks,
    load_trained,
    mask_decoder_of,
    split_mask_decoder,
)
from utils.config import Config, load_layer, merge_layers, to_yaml
from utils.errors import InputError, first_line

STATE_FILE_NAME = "training_state.json"
OPTIMIZER_FILE_NAME = "optimizer.safetensors"
RAW_WEIGHTS_FILE_NAME = "raw_weights.safetensors"
AVERAGE_FILE_NAME = "average.safetensors"
ENGINE_FOLDER_NAME = "engine"
CONFIG_FILE_NAME = "config.yaml"
BEST_FILE_NAME = "best.json"
PALETTE_FILE_NAME = "palette.json"
DEFAULT_THRESHOLD = 0.5
NAME_PATTERN = re.compile(r"checkpoint-(\d+)")


COUNTS = ("global_step", "batches_seen", "global_batch_size", "num_pairs", "num_processes")


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands.

    Args:
        global_step: optimiser updates done.
        batches_seen: batches that each process has seen.
        global_batch_size: pictures per batch over all processes.
        num_pairs: pairs of the training split.
        num_processes: processes of the run.
        engine: whose form the optimiser's state has, see `utils.engine.engine_name`.
        grad_scaler: state of the fp16 loss scaler, if there is one.
    """

    global_step: int
    batches_seen: int
    global_batch_size: int
    num_pairs: int
    num_processes: int
    engine: str
    grad_scaler: dict[str, Any] | None = None


def checkpoints_folder(output_dir: str | Path) -> Path:
    """Returns the folder of a run's checkpoints."""
    return Path(output_dir) / "checkpoints"


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Returns (global_step, folder) of each complete checkpoint, in order of steps."""
    found = []
    folder = checkpoints_folder(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME_PATTERN.fullmatch(path.name)
        if match and (path / STATE_FILE_NAME).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """Returns the content of `best.json` (`checkpoint`, `iou`, `global_step`, `threshold`), or None if it names no checkpoint.

    Raises:
        InputError: if its threshold is none.
    """
    folder = checkpoints_folder(output_dir)
    try:
        best = json.loads((folder / BEST_FILE_NAME).read_text(encoding="utf-8"))
        name, iou, step = str(best["checkpoint"]), float(best["iou"]), int(best["global_step"])
        threshold = float(best.get("threshold", DEFAULT_THRESHOLD))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not 0 <= threshold <= 1:
        raise InputError(
            f"{folder / BEST_FILE_NAME}: threshold {threshold:g} is not between 0 and 1; repair or remove the file"
        )
    known = {path.name for _, path in list_checkpoints(output_dir)}
    found = {"checkpoint": name, "iou": iou, "global_step": step, "threshold": threshold}
    return found if name in known else None


def find_checkpoint(output_dir: str | Path, name: str, key: str) -> Path:
    """Returns the folder of a checkpoint that was asked for.

    Args:
        output_dir: of the run.
        name: latest, best, a checkpoint's name, or the path of one.
        key: configuration key to name in errors.

    Raises:
        InputError: if there is no such complete checkpoint.
    """
    folder, complete = checkpoints_folder(output_dir), list_checkpoints(output_dir)
    if name == "latest":
        if not complete:
            raise InputError(f"{key}: {folder} holds no complete checkpoint; check output_dir")
        return complete[-1][1]
    if name == "best":
        best = read_best(output_dir)
        if best is None:
            raise InputError(f"{key}: {folder / BEST_FILE_NAME} names no checkpoint; use latest, or check output_dir")
        return folder / best["checkpoint"]
    for path in (folder / name, Path(name).expanduser()):
        if (path / STATE_FILE_NAME).is_file():
            return path
    names = ", ".join(path.name for _, path in complete) or "none"
    raise InputError(f"{key}: no complete checkpoint {name!r} in {folder} (there: {names})")


def best_or_latest(output_dir: str | Path) -> str:
    """Returns `best` where validation has chosen a checkpoint, else `latest`."""
    return "latest" if read_best(output_dir) is None else "best"


def chosen_threshold(config: Config, checkpoint: Path) -> float:
    """Returns the threshold to use with a checkpoint: the configuration's, or what validation chose for it.

    Where nothing was validated that is 0.5.

    Raises:
        InputError: if validation is to choose and the checkpoint is not the best, whose threshold alone is kept.
    """
    if config.threshold != "validation":
        return float(config.threshold)
    best = read_best(checkpoint.parent.parent)
    if best is None:
        return DEFAULT_THRESHOLD
    if best["checkpoint"] != checkpoint.name:
        raise InputError(
            f"threshold: validation chooses one for the best checkpoint alone, {checkpoint.name} is not; use load_checkpoint: best, "
            "or a number"
        )
    return float(best["threshold"])


def read_state(checkpoint: Path) -> TrainingState:
    """Reads a checkpoint's training state.

    Raises:
        InputError: naming the file.
    """
    path = checkpoint / STATE_FILE_NAME
    try:
        state = TrainingState(**json.loads(path.read_text(encoding="utf-8")))
        if not all(isinstance(getattr(state, name), int) for name in COUNTS):
            raise TypeError(f"{', '.join(COUNTS)} must be whole numbers")
        return state
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); resume from another checkpoint") from error


def read_palette(checkpoint: Path) -> Palette | None:
    """Returns the classes that a checkpoint tells, None if it tells glass or not."""
    path = checkpoint / PALETTE_FILE_NAME
    return Palette.from_file(path) if path.is_file() else None


def read_config(checkpoint: Path) -> Config:
    """Reads the resolved configuration that a checkpoint was trained with."""
    return merge_layers([load_layer(checkpoint / CONFIG_FILE_NAME)])


def same_base(first: Config, second: Config) -> bool:
    """Returns whether two configurations name the same base model, as a hub id or as a folder however written."""
    return Path(first.base_model_path).resolve() == Path(second.base_model_path).resolve()


def clean_up(output_dir: str | Path) -> None:
    """Removes what a killed run left half-written or half-deleted."""
    folder = checkpoints_folder(output_dir)
    for path in folder.glob(".*checkpoint-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def partial_folder(output_dir: str | Path, global_step: int) -> Path:
    """Returns the hidden folder that a checkpoint is written to before it is whole."""
    return checkpoints_folder(output_dir) / f".partial-checkpoint-{global_step}"


def write_checkpoint(
    partial: Path,
    state: TrainingState,
    config: Config,
    transformer: SD3Transformer2DModel,
    state_dict: Mapping[str, torch.Tensor],
    prompt: EmptyPrompt,
    optimizer_state: Mapping[str, torch.Tensor] | None,
    raw_weights: Mapping[str, torch.Tensor] | None = None,
    average: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint's files into `partial`, on one process.

    Args:
        partial: existing folder.
        state: of the training.
        config: resolved.
        transformer: gives the configuration.
        state_dict: whole weights, gathered from the engine, the mask decoder's among them; the moving average where there is one.
        prompt: the empty prompt.
        optimizer_state: from `gather_optimizer`; None if an engine writes its own.
        raw_weights: to resume from, where `state_dict` is a moving average.
        average: that average in fp32, whatever the precision of the weights.
    """
    # An engine may hand out views of larger buffers, which safetensors refuses.
    state_dict = {
        name: value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        for name, value in state_dict.items()
    }
    state_dict, decoder_weights = split_mask_decoder(state_dict)
    if (decoder := mask_decoder_of(transformer)) is not None:
        decoder.save_config(partial / MASK_DECODER)
        save_file(decoder_weights, partial / MASK_DECODER / "diffusion_pytorch_model.safetensors")
    if has_lora(transformer):
        save_lora(transformer, state_dict, partial / ADAPTER_FOLDER_NAME)
    else:
        transformer.save_config(partial / "transformer")
        save_torch_state_dict(
            state_dict,
            partial / "transformer",
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size="10GB",
        )
    prompt.save_file(partial / PROMPT_FILE_NAME)
    if optimizer_state is not None:
        save_file(dict(optimizer_state), partial / OPTIMIZER_FILE_NAME)
    if raw_weights is not None:
        save_file(dict(raw_weights), partial / RAW_WEIGHTS_FILE_NAME)
    if average is not None:
        save_file({name: value.cpu() for name, value in average.items()}, partial / AVERAGE_FILE_NAME)
    if palette := layout_of(config.dataset_name, config.palette).palette:
        palette.save(partial / PALETTE_FILE_NAME)
    (partial / CONFIG_FILE_NAME).write_text(to_yaml(config, comments=False), encoding="utf-8")
    (partial / STATE_FILE_NAME).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def publish_checkpoint(output_dir: str | Path, global_step: int, limit: int | None) -> Path:
    """Renames a whole checkpoint into place and removes what exceeds the limit.

    Args:
        output_dir: of the run.
        global_step: of the checkpoint.
        limit: newest checkpoints to keep beside the best; None keeps all.

    Returns:
        The checkpoint's folder.
    """
    final = checkpoints_folder(output_dir) / f"checkpoint-{global_step}"
    _discard(final)
    partial_folder(output_dir, global_step).replace(final)
    _rotate(output_dir, limit)
    return final


def mark_best(
    output_dir: str | Path, global_step: int, iou: float, limit: int | None, threshold: float = DEFAULT_THRESHOLD
) -> None:
    """Names an existing checkpoint in `best.json` and removes what exceeds the limit, the former best among it.

    Args:
        output_dir: of the run.
        global_step: of the checkpoint.
        iou: on the validation split.
        limit: newest checkpoints to keep beside the best; None keeps all.
        threshold: that serves the validation split best.
    """
    folder = checkpoints_folder(output_dir)
    partial = folder / f".{BEST_FILE_NAME}.part"
    content = {
        "checkpoint": f"checkpoint-{global_step}",
        "iou": iou,
        "global_step": global_step,
        "threshold": threshold,
    }
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / BEST_FILE_NAME)
    _rotate(output_dir, limit)


def set_aside_later(output_dir: str | Path, global_step: int) -> list[str]:
    """Renames checkpoints beyond the one that a run resumes from, so that latest and best speak of one history.

    Returns:
        The new names, `abandoned-checkpoint-N`; they can still be resumed by name.
    """
    folder, names = checkpoints_folder(output_dir), []
    best = read_best(output_dir)
    # First: a kill between would leave a best.json that comes to name the new history's checkpoint of that step.
    if best is not None and best["global_step"] > global_step:
        (folder / BEST_FILE_NAME).unlink()
    for step, path in list_checkpoints(output_dir):
        if step > global_step:
            aside = folder / f"abandoned-{path.name}"
            _discard(aside)
            path.replace(aside)
            names.append(aside.name)
    return names


def check_disk_space(
    output_dir: str | Path, num_parameters: int, limit: int | None, num_saves: int, bytes_per_parameter: int = 12
) -> None:
    """Compares the disk that the checkpoints will need with what is free.

    Args:
        output_dir: existing folder of the run.
        num_parameters: that are trained.
        limit: newest checkpoints to keep; None keeps all. The best and the one being written come on top.
        num_saves: checkpoints that the rest of the run will write.
        bytes_per_parameter: 12 for fp32 weights and AdamW's two moments.

    Raises:
        InputError: if the disk is too small.
    """
    checkpoint_bytes = bytes_per_parameter * num_parameters
    copies = num_saves + 1  # a new best is saved between the others
    if limit is not None:  # at its fullest the folder holds the newest, the best and the one being written
        copies = min(copies, max(1, limit + 2 - len(list_checkpoints(output_dir))))
    free_bytes = shutil.disk_usage(output_dir).free
    if copies * checkpoint_bytes > free_bytes:
        raise InputError(
            f"{output_dir}: {copies} checkpoints of {checkpoint_bytes / 1e9:.1f} GB need "
            f"{copies * checkpoint_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free; free some, choose another "
            "output_dir or lower checkpoints_total_limit"
        )


def build_pipeline(
    config: Config,
    base: Path,
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    prompt: EmptyPrompt,
    mask_decoder: LightMaskDecoder | None,
    palette: Palette | None,
) -> TransparencySegmentationPipeline:
    """Puts a pipeline together whose defaults are the configuration's."""
    names = [
        "objective",
        "resolution",
        "threshold",
        "denoise_steps",
        "ensemble_size",
        "tta",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "prediction",
    ]
    settings = {name: getattr(config, name) for name in names}
    if settings["threshold"] == "validation":
        settings["threshold"] = DEFAULT_THRESHOLD
    settings |= {"codec": "palette" if palette else "binary", "palette": palette.to_dict() if palette else None}
    parts = (transformer, vae, load_scheduler(base), prompt, mask_decoder)
    return TransparencySegmentationPipeline(*parts, **settings)


def load_pipeline(checkpoint: Path, dtype: torch.dtype, compiled: bool = False) -> TransparencySegmentationPipeline:
    """Loads a checkpoint as a pipeline: its transformer and prompt, and the VAE and scheduler of its base.

    Args:
        checkpoint: folder.
        dtype: of the weights.
        compiled: whether transformer and VAE run through torch.compile.

    Raises:
        InputError: if the checkpoint or its base cannot be loaded.
    """
    config = read_config(checkpoint)
    adapted = (checkpoint / ADAPTER_FOLDER_NAME).is_dir()
    parts = ("vae", "scheduler", "transformer") if adapted else ("vae", "scheduler")
    base = resolve_base(config.base_model_path, parts)
    prompt = EmptyPrompt.from_file(checkpoint / PROMPT_FILE_NAME)
    transformer = load_trained(config, base, checkpoint, dtype)
    check_prompt(prompt, transformer)
    check_resolution(config.resolution, transformer)
    if compiled:
        compile_blocks(transformer)
    vae = load_vae(base, dtype, compiled)
    decoder = None
    if (checkpoint / MASK_DECODER).is_dir():
        decoder = load_mask_decoder(checkpoint / MASK_DECODER, vae, dtype).eval()
    if config.threshold == "validation":
        best = read_best(checkpoint.parent.parent)
        chosen = best is not None and best["checkpoint"] == checkpoint.name
        config = replace(config, threshold=chosen_threshold(config, checkpoint) if chosen else DEFAULT_THRESHOLD)
    return build_pipeline(config, base, transformer, vae, prompt, decoder, read_palette(checkpoint))


def _rotate(output_dir: str | Path, limit: int | None) -> None:
    best = read_best(output_dir)
    for _, path in list_checkpoints(output_dir)[: -limit if limit else 0]:
        if best is None or path.name != best["checkpoint"]:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint so that a kill leaves either all of it or nothing under its name."""
    if path.exists():
        trash = path.with_name(f".trash-{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        path.replace(trash)
        shutil.rmtree(trash, ignore_errors=True)
