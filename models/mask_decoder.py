"""A light mask decoder: predicted latents -> one channel of logits at full resolution, in place of the VAE's decoder.

The VAE's decoder was made for pictures: it is most of the time of an inference, and where the prediction is unsure it answers
with grey that no threshold reads well. This one is trained for the mask alone, with cross-entropy and Dice on its pixels. With
lateral input it sees the picture too, as the frozen VAE encoder's own features: the detail that latents lose.

`python -m models.mask_decoder OUT` trains one on a data set's masks and the base's latents of them; a run then goes on training
it together with the transformer (`mask_decoder: light`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.codecs import build_codec
from dataset.sampling import BatchStream
from dataset.trans10k import LAYOUTS, PairDataset, collate, prepare_worker, scan
from models.base import load_part, load_vae, resolve_base
from models.latents import LatentCodec, feature_channels
from models.losses import segmentation_loss
from utils.config import FIELDS, convert
from utils.errors import InputError, run_command
from utils.schedules import learning_rate_factor
from utils.seeding import Stream, torch_generator

GROUPS = 8  # of the group norms
STAGE_CHANNELS = (32, 16, 12)  # at a quarter, half and all of the pixels' resolution
WARM_UP_STEPS = 50
MAX_NOISE = 0.5  # of the latents' standard deviation: predicted latents are never exact


class ResidualBlock(nn.Module):
    """Group norm, SiLU and two convolutions beside an identity, after the residual blocks of the VAE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the shape, (B, channels, h, w)."""
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Stage(nn.Module):
    """Doubles the resolution by a sub-pixel convolution (arXiv 1609.05158), adds the lateral input and mixes.

    Args:
        in_channels: of what comes from the stage before.
        channels: of the result.
        lateral_channels: of the picture's features at this resolution, 0 if none come.
    """

    def __init__(self, in_channels: int, channels: int, lateral_channels: int) -> None:
        super().__init__()
        self.enlarge = nn.Conv2d(in_channels, 4 * channels, 1)
        self.lateral = nn.Conv2d(lateral_channels, channels, 1) if lateral_channels else None
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Turns the VAE's features (B, lateral_channels, H, W), any float dtype, into the lateral input."""
        assert self.lateral is not None
        return self.lateral(features.to(self.lateral.weight.dtype))

    def forward(self, x: torch.Tensor, lateral: torch.Tensor | None) -> torch.Tensor:
        """(B, in_channels, h, w) and, if any, (B, channels, 2h, 2w) -> (B, channels, 2h, 2w)."""
        x = F.pixel_shuffle(self.enlarge(x), 2)
        x = x if lateral is None else x + lateral
        return x + self.second(F.silu(self.first(F.silu(x))))


class LightMaskDecoder(ModelMixin, ConfigMixin):
    """Most of its channels are at the latents' resolution; narrow stages lead from there to pixels.

    Two stages end at half the pixels' resolution, and a sub-pixel convolution gives the logits. With lateral input a third one
    works on the pixels themselves.

    Args:
        latent_channels: of the VAE.
        width: channels at the latents' resolution, a multiple of 8.
        num_blocks: residual blocks there.
        lateral_channels: of the VAE encoder's features at the full, half and a quarter of the pixels' resolution, where these
            are its lateral input; empty where it sees latents alone.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, latent_channels: int = 16, width: int = 128, num_blocks: int = 2, lateral_channels: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.entry = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        laterals = tuple(lateral_channels)[::-1] or (0, 0)
        channels = (width, *STAGE_CHANNELS[: len(laterals)])
        self.stages = nn.ModuleList(map(Stage, channels, channels[1:], laterals))
        self.exit = nn.Conv2d(channels[-1], 1 if lateral_channels else 4, 3, padding=1)

    @property
    def takes_features(self) -> bool:
        """Whether it has lateral input."""
        return bool(self.config.lateral_channels)

    @apply_forward_hook  # an offloaded decoder is called in first
    def project(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turns the VAE encoder's features into lateral inputs, which have few channels and can be kept.

        Args:
            features: of `LatentCodec.encode_with_features`, finest first; empty for a decoder without lateral input.

        Returns:
            Lateral inputs for `forward`, coarsest first, (B, c, H/2^k, W/2^k) for k = 2, 1, 0 and c of `STAGE_CHANNELS`.
        """
        return [cast(Stage, stage).project(each) for stage, each in zip(self.stages, reversed(features), strict=False)]

    def forward(self, latents: torch.Tensor, laterals: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Turns latents (B, C, h, w), any float dtype, into logits of the mask (B, 8h, 8w), float32.

        Args:
            latents: predicted.
            laterals: of `project`, coarsest first.

        Raises:
            ValueError: if lateral inputs are missing or too many.
        """
        if len(laterals) != len(self.config.lateral_channels):
            raise ValueError(
                f"{len(laterals)} lateral inputs for a decoder that takes {len(self.config.lateral_channels)}"
            )
        x = self.blocks(self.entry(latents.to(self.entry.weight.dtype)))
        for number, stage in enumerate(self.stages):
            x = stage(x, laterals[number] if laterals else None)
        x = self.exit(F.silu(x))
        return (x if laterals else F.pixel_shuffle(x, 2)).squeeze(1).float()


def load_mask_decoder(folder: Path, vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> LightMaskDecoder:
    """Loads a decoder.

    Args:
        folder: that `save_pretrained` wrote.
        vae: whose latents, and features if it has lateral input, it must take.
        dtype: of the weights.

    Raises:
        InputError: naming the folder, if it is missing or broken, or belongs to other latents.
    """
    decoder = load_part(LightMaskDecoder, folder.parent, folder.name, dtype)
    for what, wanted, given in (
        ("{} latent channels", decoder.config.latent_channels, vae.config.latent_channels),
        ("VAE features of {} channels", list(decoder.config.lateral_channels), feature_channels(vae)),
    ):
        if wanted and wanted != given:
            raise InputError(
                f"{folder}: a mask decoder for {what.format(wanted)}, this base has {given}; check mask_decoder_path"
            )
    return decoder


def train(
    vae: AutoencoderKL,
    data: PairDataset,
    codec_name: str,
    *,
    width: int,
    lateral: bool,
    steps: int,
    batch_size: int,
    peak_rate: float,
    seed: int,
    num_workers: int = 0,
) -> LightMaskDecoder:
    """Trains a decoder on the latents of true masks, each with noise of a strength between none and half their deviation.

    Args:
        vae: frozen, on the device to train on.
        data: pictures and masks; pictures are read, and not looked at, without lateral input.
        codec_name: a key of `dataset.codecs.CODECS`.
        width: of the decoder.
        lateral: whether it takes the VAE encoder's features of the picture.
        steps: updates.
        batch_size: masks per update.
        peak_rate: of AdamW, after a warm-up of 50 updates and before a cosine decay.
        seed: of weights, order and noise.
        num_workers: loader processes.

    Raises:
        InputError: if a file cannot be read.
    """
    set_seed(seed)
    codec, latent_codec = build_codec(codec_name), LatentCodec(vae)
    laterals = feature_channels(vae) if lateral else []
    decoder = LightMaskDecoder(int(vae.config.latent_channels), width, lateral_channels=laterals).to(vae.device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak_rate)
    stream = BatchStream(len(data), batch_size, seed, stop=steps)
    loader = DataLoader(
        data, batch_sampler=stream, num_workers=num_workers, collate_fn=collate, worker_init_fn=prepare_worker
    )
    losses: list[torch.Tensor] = []
    bar = tqdm(enumerate(loader), total=steps, desc="mask decoder", unit="update")
    for step, batch in bar:
        factor = learning_rate_factor(step, steps, WARM_UP_STEPS, "cosine", 0.5, 0.02)
        optimizer.param_groups[0]["lr"] = peak_rate * factor
        labels = batch["label"].to(vae.device)
        latents = latent_codec.encode(codec.encode(labels))
        generator = torch_generator(Stream.TRAINING_NOISE, seed, 2, step)
        strength = MAX_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
        noise = (strength * torch.randn(latents.shape, generator=generator)).to(latents.device)
        features = latent_codec.encode_with_features(batch["image"].to(vae.device) * 2 - 1)[1] if lateral else []
        logits = decoder(latents + noise * latents.std(), decoder.project(features))
        loss = segmentation_loss(logits, labels.float()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 50 == 49 or step + 1 == steps:
            bar.set_postfix_str(f"loss {torch.stack(losses[-50:]).mean().item():.4f}")
    return decoder.eval()


def main() -> None:
    """Command line: trains a decoder for a base and a data set."""
    parser = argparse.ArgumentParser(
        prog="python -m models.mask_decoder", description="Trains a light mask decoder on the masks of a data set."
    )
    parser.add_argument("out", type=Path, help="folder to write; give it to the trainer as mask_decoder_path")
    defaults = {"base_model_path": "assets/tiny_sd3", "dataset_name": "trans10k", "dataset_path": "assets/glass_sample"}
    defaults |= {"resolution": "128", "seed": "0", "dataloader_num_workers": "0", "mismatched_pairs": "error"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, help=f"{FIELDS[name].metadata['meaning']} [{default}]")
    for name, number, meaning in (("width", 128, "channels"), ("steps", 600, "updates"), ("batch_size", 16, "masks")):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{meaning} [{number}]")
    parser.add_argument(
        "--lateral", action="store_true", help="with the VAE encoder's features of the picture as input"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate [2e-3]")
    arguments = parser.parse_args()
    given = {name: convert(name, getattr(arguments, name), f"--{name}") for name in defaults}
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"{arguments.out}: exists already; choose another folder")
    if min(arguments.width, arguments.steps, arguments.batch_size) < 1 or arguments.width % GROUPS or arguments.lr <= 0:
        raise InputError(f"--width must be a multiple of {GROUPS}; --steps, --batch_size and --lr must be positive")
    layout = LAYOUTS[given["dataset_name"]]
    if layout.palette:
        raise InputError(
            f"--dataset_name {given['dataset_name']}: a light mask decoder tells glass or not, these masks tell classes"
        )
    pairs = scan(
        given["dataset_name"], given["dataset_path"], "train", mismatched_pairs=given["mismatched_pairs"]
    ).pairs
    vae = load_vae(resolve_base(given["base_model_path"], ("vae",)), torch.float32)
    decoder = train(
        vae.to("cuda" if torch.cuda.is_available() else "cpu"),
        PairDataset(pairs, layout.read_label, given["resolution"], augmentation_seed=given["seed"]),
        layout.codec,
        width=arguments.width,
        lateral=arguments.lateral,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        peak_rate=arguments.lr,
        seed=given["seed"],
        num_workers=given["dataloader_num_workers"],
    )
    decoder.half().save_pretrained(arguments.out, safe_serialization=True)
    print(f"{arguments.out}: {decoder.num_parameters() / 1e6:.2f} M parameters")


if __name__ == "__main__":
    run_command(main)
