"""Builds the Accelerator from the configuration and checks that what was launched is what came."""

from __future__ import annotations

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

TESTED_ENGINES = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
)
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
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
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
    if accelerator.distributed_type not in TESTED_ENGINES:
        raise InputError(
            f"the launch file asks for {accelerator.distributed_type.value}; this version trains with one process, "
            "MULTI_GPU (DDP) or DEEPSPEED"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.state.deepspeed_plugin.deepspeed_config
        engine["train_micro_batch_size_per_gpu"] = config.train_batch_size
        engine["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        # Accelerate fills an open value with 1.0, whatever the configuration says; 0 means no clipping.
        engine["gradient_clipping"] = config.max_grad_norm or 0.0
    return accelerator


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
