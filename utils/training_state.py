"""Begins, saves and restores a training under any engine; called by all processes together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from dataset.trans10k import layout_of
from models.prompt import EmptyPrompt
from utils import checkpoints
from utils.checkpoints import TrainingState
from utils.config import Config, to_yaml
from utils.ema import MovingAverage
from utils.engine import engine_name, uses_deepspeed
from utils.errors import InputError, first_line
from utils.plan import TrainingPlan
from utils.provenance import write_provenance
from utils.tensors import gather_optimizer, load_optimizer
from utils.trackers import start_tracker


def find_resumed(config: Config) -> Path | None:
    """Returns the checkpoint that the configuration asks to resume from, None for a fresh run.

    Raises:
        InputError: if it is missing or was trained otherwise, or if a fresh run would go into an occupied folder.
    """
    if config.resume_from_checkpoint is None:
        if complete := checkpoints.list_checkpoints(config.output_dir):
            raise InputError(
                f"{config.output_dir}: holds {complete[-1][1].name} of an earlier run; go on with "
                "--resume_from_checkpoint latest, or choose another output_dir"
            )
        return None
    found = checkpoints.find_checkpoint(config.output_dir, config.resume_from_checkpoint, "resume_from_checkpoint")
    trained = checkpoints.read_config(found)
    for name in (
        "trainable",
        "prediction",
        "mask_decoder",
        "fold_conditioning",
        "drop_zero_prompt_rows",
        "lora_rank",
        "lora_targets",
    ):
        if getattr(trained, name) != getattr(config, name):
            raise InputError(
                f"{found}: was trained with {name}: {getattr(trained, name)}, not {getattr(config, name)}; resume with the "
                "run's own flags and files"
            )
    if checkpoints.read_palette(found) != layout_of(config.dataset_name, config.palette).palette:
        raise InputError(
            f"{found}: was trained to tell other classes than the masks of dataset_name: {config.dataset_name} with palette: "
            f"{config.palette} do; resume with the run's own flags and files"
        )
    if trained.objective != config.objective or not checkpoints.same_base(trained, config):
        raise InputError(
            f"{found}: was trained with {trained.objective} on {trained.base_model_path}, not {config.objective} on "
            f"{config.base_model_path}; resume with the run's own flags and files (if the base has moved, correct "
            f"{found / checkpoints.CONFIG_FILE_NAME})"
        )
    return found


def prepare_output(
    accelerator: Accelerator, config: Config, plan: TrainingPlan, num_parameters: int, global_step: int
) -> None:
    """Writes the resolved configuration and the run's origin, checks the disk and starts the tracker, before the first step.

    Args:
        accelerator: of the run.
        config: resolved.
        plan: of the run.
        num_parameters: that are trained.
        global_step: updates done; checkpoints beyond it are set aside.

    Raises:
        InputError: if the folder cannot be written or the disk is too small.
    """
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.clean_up(output_dir)
            resolved = to_yaml(replace(config, resume_from_checkpoint=None))
            (output_dir / checkpoints.CONFIG_FILE_NAME).write_text(resolved, encoding="utf-8")
            write_provenance(output_dir / "provenance.json", config.seed)
        except OSError as error:
            raise InputError(
                f"{output_dir}: cannot be written ({error.strerror}); choose another output_dir"
            ) from error
        if config.resume_from_checkpoint and (aside := checkpoints.set_aside_later(output_dir, global_step)):
            print(f"checkpoints beyond update {global_step} are set aside: {', '.join(aside)}")
        checkpoints.check_disk_space(
            output_dir,
            num_parameters,
            config.checkpoints_total_limit,
            num_saves=plan.num_saves(global_step),
            bytes_per_parameter=bytes_per_parameter(config, uses_deepspeed(accelerator)),
        )
    accelerator.wait_for_everyone()
    start_tracker(accelerator, config)


def bytes_per_parameter(config: Config, with_deepspeed: bool = False) -> int:
    """Returns what a trained parameter takes in a checkpoint: itself, two moments, and raw value and fp32 average if there is one."""
    if with_deepspeed:
        return 20  # its shards beside the whole weights
    weight = {"fp32": 4, "bf16": 2}[config.weights]
    moments = 2 if config.optimizer == "adamw_8bit" else 2 * weight
    return weight + moments + (weight + 4 if config.ema_decay is not None else 0)


def save_training(
    accelerator: Accelerator,
    config: Config,
    state: TrainingState,
    transformer: Any,
    optimizer: Any,
    prompt: EmptyPrompt,
    average: MovingAverage | None = None,
) -> None:
    """Writes a checkpoint beside the others and renames it when it is whole.

    Args:
        accelerator: of the run.
        config: resolved.
        state: where the training stands.
        transformer: prepared by the engine.
        optimizer: prepared by the engine.
        prompt: the empty prompt.
        average: whose weights the checkpoint shows instead of the raw ones.
    """
    partial = checkpoints.partial_folder(config.output_dir, state.global_step)
    if accelerator.is_main_process:
        checkpoints.clean_up(config.output_dir)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    bare = accelerator.unwrap_model(transformer)
    sharded = uses_deepspeed(accelerator)
    if sharded:
        transformer.save_checkpoint(str(partial / checkpoints.ENGINE_FOLDER_NAME), tag="state")
    keep = accelerator.is_main_process
    optimizer_state = None if sharded else gather_optimizer(optimizer.optimizer, bare.named_parameters(), keep)
    with average.in_place() if average else nullcontext() as raw_weights:
        state_dict = accelerator.get_state_dict(transformer)
        if sharded:
            (raw_weights if raw_weights is not None else state_dict or {}).update(_masters(bare, keep))
        if accelerator.is_main_process:
            checkpoints.write_checkpoint(
                partial,
                state,
                replace(config, resume_from_checkpoint=None),
                bare,
                state_dict,
                prompt,
                optimizer_state,
                raw_weights,
                average.average if average else None,
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.publish_checkpoint(config.output_dir, state.global_step, config.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def _masters(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Returns DeepSpeed's fp32 weights, whole and on the CPU, of which the model itself holds roundings to half precision.

    Called by all processes together; those that do not `keep` them take part and return nothing.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if keep and whole is not None:
                masters[name] = whole.detach().float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape))
    return masters


def restore_raw_weights(checkpoint: Path, transformer: torch.nn.Module) -> None:
    """Puts a checkpoint's raw weights into the model, which holds its average; before an engine takes copies of them.

    A checkpoint without raw weights holds them itself.

    Raises:
        InputError: naming the file that cannot be read.
    """
    path = checkpoint / checkpoints.RAW_WEIGHTS_FILE_NAME
    parameters = dict(transformer.named_parameters())
    with _resuming_from(path), torch.no_grad():
        for name, value in load_file(path).items() if path.is_file() else ():
            parameters[name].copy_(value)


def restore_average(checkpoint: Path, average: MovingAverage) -> None:
    """Goes on from a checkpoint's average; one that has none lets it start from its weights.

    Raises:
        InputError: naming the file that cannot be read.
    """
    path = checkpoint / checkpoints.AVERAGE_FILE_NAME
    if path.is_file():
        with _resuming_from(path):
            average.load(load_file(path))


@contextmanager
def _resuming_from(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be resumed from ({first_line(error)}); use another checkpoint") from error


def restore_optimizer(
    accelerator: Accelerator, config: Config, checkpoint: Path, transformer: Any, optimizer: Any
) -> None:
    """Reads the optimiser's state of a checkpoint, where engine and optimiser have the same form of it; else warns.

    Raises:
        InputError: naming the file that cannot be read.
    """
    state, engine = checkpoints.read_state(checkpoint), engine_name(accelerator)
    trained = checkpoints.read_config(checkpoint)
    if (trained.optimizer, trained.weights) != (config.optimizer, config.weights):
        accelerator.print(
            f"warning: the optimiser starts fresh, its state was written by optimizer: {trained.optimizer} with weights: {trained.weights}"
        )
    elif state.engine != engine or (uses_deepspeed(accelerator) and state.num_processes != accelerator.num_processes):
        accelerator.print(
            f"warning: the optimiser starts fresh, its state was written by {state.engine} with {state.num_processes} processes"
        )
    elif uses_deepspeed(accelerator):
        transformer.load_checkpoint(str(checkpoint / checkpoints.ENGINE_FOLDER_NAME), tag="state")
    else:
        path = checkpoint / checkpoints.OPTIMIZER_FILE_NAME
        with _resuming_from(path):
            load_optimizer(optimizer.optimizer, accelerator.unwrap_model(transformer).named_parameters(), path)
    if accelerator.scaler is not None and state.grad_scaler:
        accelerator.scaler.load_state_dict(state.grad_scaler)
