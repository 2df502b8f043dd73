"""Tiny models and data sets that every test can afford, and a way to launch the real entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image

from models.base import PROMPT_FILE_NAME
from models.mask_decoder import LightMaskDecoder
from models.prompt import EmptyPrompt

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = 32


def make_vae() -> AutoencoderKL:
    """A VAE with random weights: 16 latent channels at 1/8 scale."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.1,
    ).eval()


def make_transformer(**changes: object) -> SD3Transformer2DModel:
    """A transformer with random weights, two layers, dual attention and qk norm as in SD3.5."""
    torch.manual_seed(2)
    settings = {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**{**settings, **changes})


def make_prompt() -> EmptyPrompt:
    """Random embeddings that fit `make_transformer`."""
    generator = torch.Generator().manual_seed(3)
    return EmptyPrompt.from_tensors(torch.randn(1, 3, 32, generator=generator), torch.randn(1, 16, generator=generator))


def write_base(folder: Path) -> Path:
    """Writes a base model in the Diffusers layout."""
    make_vae().save_pretrained(folder / "vae")
    make_transformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    make_prompt().save_file(folder / PROMPT_FILE_NAME)
    torch.manual_seed(5)
    LightMaskDecoder(16, 8).save_pretrained(folder / "mask_decoder")
    LightMaskDecoder(16, 8, lateral_channels=(8, 8, 8)).save_pretrained(folder / "lateral")
    return folder


def write_pair(folder: Path, name: str, number: int, value: int = 255, size: tuple[int, int] = (40, 36)) -> None:
    """Writes a picture of noise with a bright rectangle, and the rectangle as its mask of colour `value`."""
    rng = np.random.default_rng(number)
    width, height = size
    image = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width, 3), np.uint8)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    box = (slice(top, top + height // 2), slice(left, left + width // 2))
    image[box] += 120
    mask[box] = value
    for kind, array, file in (("images", image, f"{name}.jpg"), ("masks", mask, f"{name}_mask.png")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / file)


def write_trans10k(root: Path, train: int = 6, validation: int = 3, test: int = 5) -> Path:
    """Writes a data set in the Trans10k layout; the easy and hard folders of validation and test hold equal stems."""
    for number in range(train):
        write_pair(root / "train", str(number), number, 85 if number % 2 else 255)
    for split, count in (("validation", validation), ("test", test)):
        for difficulty, offset in (("easy", 100), ("hard", 200)):
            for number in range(count):
                write_pair(root / split / difficulty, str(number), offset + number, 85 if number % 2 else 255)
    return root


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def trans10k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the Trans10k layout: 6 training, 2 x 3 validation, 2 x 5 test pairs."""
    return write_trans10k(tmp_path_factory.mktemp("trans10k"))


@pytest.fixture
def flags(base: Path, trans10k: Path, tmp_path: Path) -> dict[str, object]:
    """Flags of a training that takes a second."""
    return {
        "base_model_path": base,
        "dataset_path": trans10k,
        "output_dir": tmp_path / "run",
        "resolution": RESOLUTION,
        "data_type": "fp32",
        "dataloader_num_workers": 0,
        "gradient_checkpointing": "false",
        "max_train_steps": 6,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lr": 1e-3,
        "scale_lr": "false",
        "lr_warmup_steps": 2,
        "save_checkpoint_steps": 3,
        "val_steps": 6,
        "log_steps": 1,
        "test_batch_size": 3,
        "ensemble_size": 2,
        "denoise_steps": 2,
    }


Launch = Callable[..., subprocess.CompletedProcess[str]]


def arguments_of(flags: dict[str, object]) -> list[str]:
    """Turns a mapping into command-line flags."""
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    """An environment without a launcher's traces and without any hub."""
    foreign = ("ACCELERATE_", "TORCHELASTIC_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture
def launch() -> Launch:
    """Runs an entry point: `launch("trainer.py", flags, launcher=None or a launch file)`."""

    def run(
        script: str,
        flags: dict[str, object],
        launcher: str | None = None,
        check: int | None = 0,
        timeout: float = 300,
        threads: int = 1,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if launcher is not None:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / launcher)]
        done = subprocess.run(
            [*command, str(ROOT / script), *arguments_of(flags)],
            capture_output=True,
            text=True,
            env={**environment(), "OMP_NUM_THREADS": str(threads)},
            timeout=timeout,
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    return run
