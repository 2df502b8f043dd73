"""A light mask decoder: predicted latents -> one channel of logits at full resolution, in place of the VAE's decoder.

The VAE's decoder was made for pictures: it is most of the time of an inference, and where the prediction is unsure it answers
with grey that no threshold reads well. This one is trained for the mask alone, with cross-entropy and Dice on its pixels.

`python -m models.mask_decoder OUT` trains one on a data set's masks and the base's latents of them; a run then goes on training
it together with the transformer (`mask_decoder: light`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.codecs import LabelReader, build_codec
from dataset.sampling import BatchStream
from dataset.trans10k import LAYOUTS, Pair, prepare_worker, scan
from dataset.transforms import flip, read_label
from models.base import load_part, load_vae, resolve_base
from models.latents import DOWNSCALE, LatentCodec
from models.losses import segmentation_loss
from utils.config import FIELDS, convert
from utils.errors import InputError, run_command
from utils.seeding import Stream, numpy_generator, torch_generator

GROUPS = 8  # of the group norm
DETAIL_CHANNELS = 16  # at half the pixels' resolution
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


class LightMaskDecoder(ModelMixin, ConfigMixin):
    """Nearly all of its work is done at the latents' resolution; pixels come from sub-pixel convolutions (arXiv 1609.05158).

    Args:
        latent_channels: of the VAE.
        width: channels at the latents' resolution, a multiple of 8.
        num_blocks: residual blocks there.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, latent_channels: int = 16, width: int = 128, num_blocks: int = 2) -> None:
        super().__init__()
        self.entry = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        self.enlarge = nn.Conv2d(width, DETAIL_CHANNELS * (DOWNSCALE // 2) ** 2, 1)
        self.detail = nn.Conv2d(DETAIL_CHANNELS, DETAIL_CHANNELS, 3, padding=1)
        self.exit = nn.Conv2d(DETAIL_CHANNELS, 4, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Turns latents (B, C, h, w), any float dtype, into logits of the mask (B, 8h, 8w), float32."""
        x = self.blocks(self.entry(latents.to(self.entry.weight.dtype)))
        x = F.pixel_shuffle(self.enlarge(x), DOWNSCALE // 2)  # (B, 16, 4h, 4w)
        return F.pixel_shuffle(self.exit(F.silu(self.detail(x))), 2).squeeze(1).float()


def load_mask_decoder(folder: Path, latent_channels: int, dtype: torch.dtype = torch.float32) -> LightMaskDecoder:
    """Loads a decoder.

    Args:
        folder: that `save_pretrained` wrote.
        latent_channels: that it must take.
        dtype: of the weights.

    Raises:
        InputError: naming the folder, if it is missing or broken, or belongs to other latents.
    """
    decoder = load_part(LightMaskDecoder, folder.parent, folder.name, dtype)
    if decoder.config.latent_channels != latent_channels:
        raise InputError(
            f"{folder}: a mask decoder for {decoder.config.latent_channels} latent channels, this base has {latent_channels}; "
            "check mask_decoder_path"
        )
    return decoder


class FlippedLabels(Dataset[torch.Tensor]):
    """The masks of a split, flipped with probability one half; indexed by (epoch, index).

    Args:
        pairs: of the split.
        reader: the layout's mask reader.
        resolution: side in pixels.
        seed: of the flips.
    """

    def __init__(self, pairs: Sequence[Pair], reader: LabelReader, resolution: int, seed: int) -> None:
        self.pairs, self.reader, self.resolution, self.seed = pairs, reader, resolution, seed

    def __len__(self) -> int:
        """Returns the number of masks."""
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        """Returns a label (H, W), uint8.

        Raises:
            InputError: naming the file that cannot be read.
        """
        epoch, index = key
        label = read_label(self.pairs[index].mask_path, self.reader, self.resolution)
        flipped = numpy_generator(Stream.AUGMENTATION, self.seed, epoch, index).random() < 0.5
        return torch.from_numpy(flip(label) if flipped else label)


def train(
    vae: AutoencoderKL,
    data: FlippedLabels,
    codec_name: str,
    *,
    width: int,
    steps: int,
    batch_size: int,
    peak_rate: float,
    seed: int,
    num_workers: int = 0,
) -> LightMaskDecoder:
    """Trains a decoder on the latents of true masks, each with noise of a strength between none and half their deviation.

    Args:
        vae: frozen, on the device to train on.
        data: masks.
        codec_name: a key of `dataset.codecs.CODECS`.
        width: of the decoder.
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
    decoder = LightMaskDecoder(int(vae.config.latent_channels), width).to(vae.device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak_rate)
    stream = BatchStream(len(data), batch_size, seed, stop=steps)
    loader = DataLoader(data, batch_sampler=stream, num_workers=num_workers, worker_init_fn=prepare_worker)
    losses: list[torch.Tensor] = []
    bar = tqdm(enumerate(loader), total=steps, desc="mask decoder", unit="update")
    for step, labels in bar:
        warm, decay = min(1.0, (step + 1) / WARM_UP_STEPS), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = peak_rate * warm * (0.02 + 0.98 * decay)
        labels = labels.to(vae.device)
        latents = latent_codec.encode(codec.encode(labels))
        generator = torch_generator(Stream.TRAINING_NOISE, seed, 2, step)
        strength = MAX_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
        noise = (strength * torch.randn(latents.shape, generator=generator)).to(latents.device)
        loss = segmentation_loss(decoder(latents + noise * latents.std()), labels.float()).mean()
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
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate [2e-3]")
    arguments = parser.parse_args()
    given = {name: convert(name, getattr(arguments, name), f"--{name}") for name in defaults}
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"{arguments.out}: exists already; choose another folder")
    if min(arguments.width, arguments.steps, arguments.batch_size) < 1 or arguments.width % GROUPS or arguments.lr <= 0:
        raise InputError(f"--width must be a multiple of {GROUPS}; --steps, --batch_size and --lr must be positive")
    layout = LAYOUTS[given["dataset_name"]]
    pairs = scan(
        given["dataset_name"], given["dataset_path"], "train", mismatched_pairs=given["mismatched_pairs"]
    ).pairs
    vae = load_vae(resolve_base(given["base_model_path"], ("vae",)), torch.float32)
    decoder = train(
        vae.to("cuda" if torch.cuda.is_available() else "cpu"),
        FlippedLabels(pairs, layout.read_label, given["resolution"], given["seed"]),
        layout.codec,
        width=arguments.width,
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
