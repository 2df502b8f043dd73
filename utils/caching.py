"""Fills the latent cache of a run with its own VAE, on all of its processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dataset.latent_cache import CachedLatents, LatentCache, fill
from dataset.trans10k import Pair, layout_of
from models.pipeline import TransparencySegmentationPipeline
from utils.config import Config


def cached_latents(
    config: Config,
    pairs: Sequence[Pair],
    pipeline: TransparencySegmentationPipeline,
    accelerator: Accelerator,
    poll_stop: Callable[[], int],
) -> CachedLatents:
    """Returns the training pairs as latents, after writing what the cache lacks.

    Args:
        config: of the run.
        pairs: of the training split.
        pipeline: whose VAE encodes.
        accelerator: of the run.
        poll_stop: of this process alone; a non-zero exit code ends the filling, what is whole is kept.

    Raises:
        InputError: if the cache is stale, damaged or does not fit the disk.
    """
    layout = layout_of(config.dataset_name, config.palette)
    cache = LatentCache(
        Path(config.latent_cache_path or Path(config.output_dir) / "latent_cache"),
        pairs,
        config.resolution,
        config.seed if config.augmentation else None,
        config.latent_cache_variants,
        {
            "dataset_name": config.dataset_name,
            "palette": layout.palette.to_dict() if layout.palette else None,
            "VAE": fingerprint_of_weights(pipeline.vae),
            "data_type": config.data_type,
        },
    )
    if accelerator.is_main_process:
        cache.claim()
    accelerator.wait_for_everyone()
    fill(
        cache,
        layout.read_label,
        lambda images: pipeline.encode_images(images)[0],
        pipeline.encode_labels,
        batch_size=config.test_batch_size,
        num_workers=config.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        poll_stop=poll_stop,
    )
    accelerator.wait_for_everyone()
    return CachedLatents(cache, config.seed)


def fingerprint_of_weights(model: Any) -> str:
    """Returns a digest of a VAE's weights, in whatever memory layout, and of its scaling."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    scaling = {name: model.config[name] for name in ("scaling_factor", "shift_factor")}
    digest.update(str(scaling).encode())
    return digest.hexdigest()[:16]
