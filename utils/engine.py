"""Builds the Accelerator from the configuration and checks that what was launched is what came."""

from __future__ import annotations

import contextlib
import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from utils.config import Config
from utils.errors import InputError

SUPPORTED_ENGINES = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MIXED_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def build_accelerator(config: Config, trackers: list[str] | None = None) -> Accelerator:
    """Returns the Accelerator of a run; batch size, accumulation, precision and clipping come from the configuration.

    Args:
        config: of the run.
        trackers: names of Accelerate's trackers.

    Raises:
        InputError: if the precision does not fit the machine, or if several processes were started and each of them
            believes to be the only one.
    """
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    has_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("true", "1")
    if config.data_type == "fp16" and not has_cuda:
        raise InputError("data_type: fp16 needs a GPU; use bf16 or fp32 on this machine")
    check_launcher_settings(config)
    accelerator = Accelerator(
        # cpu=True turns a DeepSpeed launch silently into plain data parallelism, so only where it is the plain CPU.
        cpu=not has_cuda and not uses_deepspeed,
        mixed_precision=MIXED_PRECISION[config.data_type],
        # A plugin, because the number alone is overridden by the launcher's environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            # The one buffer is SD3's table of positions, 906 MB of SD3.5 medium's; it never changes.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
        log_with=trackers or None,
        project_dir=config.output_dir,
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise InputError(
            f"{asked} processes were launched but each sees {accelerator.num_processes} (DeepSpeed on CPUs does this, or "
            "a launch file without use_cpu): they would train apart and overwrite each other. Launch one process, or use "
            "configs/accelerate/cpu_2_processes.yaml"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type not in SUPPORTED_ENGINES:
        raise InputError(
            f"the launch file asks for {accelerator.distributed_type.value}; this version trains with one process, "
            "MULTI_GPU (DDP), DEEPSPEED or FSDP"
        )
    _check_support(config, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.state.deepspeed_plugin.deepspeed_config
        _check_engine_settings(config, engine)
        engine["train_micro_batch_size_per_gpu"] = config.train_batch_size
        engine["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        # Accelerate fills an open value with 1.0, whatever the configuration says; 0 means no clipping.
        engine["gradient_clipping"] = config.max_grad_norm or 0.0
    return accelerator


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory for the process instead of handing it back.

    On a CPU the tensors of each step are large enough for glibc to ask the system for new pages every time, which cost more
    than the work on them. Nothing happens where the library is another.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        # Older versions refuse more than 32 MiB. Trimming alone would leave the threshold low for good.
        if library.mallopt(M_MMAP_THRESHOLD, 2**30) or library.mallopt(M_MMAP_THRESHOLD, 2**25):
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_launcher_settings(config: Config) -> None:
    """Compares what the launch file says once more with the configuration.

    Raises:
        InputError: naming both, if they disagree.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", MIXED_PRECISION[config.data_type]):
        raise InputError(
            f"the launch file's mixed_precision is {precision}, data_type is {config.data_type}; leave it out of the launch "
            "file, it is said in config.yaml"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto", str(config.gradient_accumulation_steps)):
        raise InputError(
            f"the launch file's gradient_accumulation_steps is {accumulation}, the configuration's is "
            f"{config.gradient_accumulation_steps}; leave it out of the launch file, it is said in config.yaml"
        )


def _check_engine_settings(config: Config, engine: dict[str, Any]) -> None:
    """Compares what a DeepSpeed file says once more with the configuration.

    Raises:
        InputError: naming both, if they disagree.
    """
    said = {
        "train_micro_batch_size_per_gpu": ("train_batch_size", config.train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm or 0.0),
    }
    for name, (key, value) in said.items():
        if engine.get(name, "auto") not in ("auto", value):
            raise InputError(
                f"the DeepSpeed file's {name} is {engine[name]}, {key} is {value}; write auto there, it is said in config.yaml"
            )
    whole = config.train_batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    if engine.get("train_batch_size", "auto") not in ("auto", whole):
        raise InputError(
            f"the DeepSpeed file's train_batch_size is {engine['train_batch_size']}, train_batch_size times "
            f"gradient_accumulation_steps times processes is {whole}; write auto there, it is said in config.yaml"
        )
    for precision in ("bf16", "fp16"):
        enabled = engine.get(precision, {}).get("enabled", "auto")
        if enabled not in ("auto", config.data_type == precision):
            raise InputError(
                f"the DeepSpeed file's {precision} is {str(enabled).lower()}, data_type is {config.data_type}; write auto there, "
                "it is said in config.yaml"
            )


def _check_support(config: Config, accelerator: Accelerator) -> None:
    """Looks for what an engine cannot do.

    Raises:
        InputError: naming key and engine.
    """
    name = engine_name(accelerator)
    sharded = name == "deepspeed_zero3" or accelerator.distributed_type == DistributedType.FSDP
    if config.ema_decay is not None and sharded:
        raise InputError(
            "ema_decay: the average needs whole weights on every process; use DDP or ZeRO-2, or leave it out"
        )
    if (config.optimizer, config.weights) != ("adamw", "fp32") and (sharded or uses_deepspeed(accelerator)):
        raise InputError(
            f"optimizer: {config.optimizer} with weights: {config.weights} works with one process or DDP; this engine has "
            "its own ways to save memory"
        )
    if config.mask_decoder == "light" and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            "mask_decoder: light works with one process, DDP or DeepSpeed; with FSDP2 use mask_decoder: vae"
        )
    if config.trainable == "lora" and sharded:
        raise InputError(
            "trainable: lora works with one process, DDP or ZeRO-2: adapters are small, nothing needs sharding"
        )


def engine_name(accelerator: Accelerator) -> str:
    """Returns whose form the optimiser's state has: torch, or deepspeed_zero with its stage."""
    if not uses_deepspeed(accelerator):
        return "torch"
    return f"deepspeed_zero{accelerator.state.deepspeed_plugin.zero_stage}"


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Returns whether the engine is DeepSpeed."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def clip_gradients(accelerator: Accelerator, model: Any, max_norm: float | None) -> torch.Tensor | None:
    """Clips the gradients of an update and returns their norm before clipping.

    DeepSpeed has clipped and stepped inside its backward pass by then; its norm is read afterwards.
    """
    if uses_deepspeed(accelerator):
        norm = model.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(float(norm))
    return accelerator.clip_grad_norm_(model.parameters(), max_norm if max_norm is not None else float("inf"))
