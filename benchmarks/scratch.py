"""What a plain network does in the same minutes: a small U-Net or a SegFormer from scratch, scored like the trainer's checkpoints.

It sees the pictures that a training run sees, in the same order and with the same augmentation, for a fixed time on the
CPU. Only the weights at the end of that time are scored, once each on the validation and the test split.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from dataset.codecs import BinaryCodec
from dataset.sampling import BatchStream
from dataset.trans10k import LAYOUTS, PairDataset, collate, scan
from models.losses import segmentation_loss
from utils.config import FIELDS, convert
from utils.engine import keep_freed_memory
from utils.errors import InputError, TrainingDivergedError, run_command
from utils.metrics import PictureScore, best_threshold, iou_curves, score_picture, summarise
from utils.protocols import histogram
from utils.provenance import machine
from utils.report import format_table

CHANNELS = (16, 40, 96, 224)  # few where pictures are large and costly, many where they are small
PEAK_RATE = 2e-3
CONFIG_FLAGS = {"dataset_name": "trans10k", "resolution": 128, "seed": 0, "augmentation": True, "threshold": 0.5}


class UNet(nn.Module):
    """Levels of two convolutions with `channels` (multiples of 8), halved by max pooling, doubled by nearest neighbour."""

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(*pair) for pair in zip((3, *channels[:-1]), channels, strict=True))
        upwards = zip(channels[:0:-1], channels[-2::-1], strict=True)
        self.up = nn.ModuleList(_block(below + skip, skip) for below, skip in upwards)
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Turns pictures (B, 3, H, W) in [0, 1] into logits of glass (B, H, W), for any H and W of at least 8."""
        x = (image * 2 - 1).contiguous(memory_format=torch.channels_last)  # the faster layout on CPUs
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)  # (B, channels[level], H / 2^level, W / 2^level)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1))
        return self.head(x).squeeze(1)


class SegFormer(nn.Module):
    """SegFormer of the size B0 (arXiv 2105.15203) from random weights, its logits enlarged to the picture's size."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Turns pictures (B, 3, H, W) in [0, 1] into logits of glass (B, H, W)."""
        logits = self.network(pixel_values=image * 2 - 1).logits  # (B, 1, H / 4, W / 4)
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


NETWORKS: dict[str, tuple[type[nn.Module], float]] = {"unet": (UNet, PEAK_RATE), "segformer": (SegFormer, 5e-4)}


def train(
    model: nn.Module, data: PairDataset, minutes: float, batch_size: int, seed: int, peak_rate: float = PEAK_RATE
) -> tuple[int, float]:
    """Trains with AdamW, the rate a cosine of the share of time gone, and returns pictures seen and minutes used.

    Loading the pictures counts as time; the last update is finished.

    Raises:
        TrainingDivergedError: if the loss is not finite.
    """
    stream = BatchStream(len(data), batch_size, seed, stop=sys.maxsize)
    batches = iter(DataLoader(data, batch_sampler=stream, collate_fn=collate))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, fused=True)
    pictures_seen, start = 0, time.perf_counter()
    with tqdm(desc=f"training for {minutes:g} minutes", unit=" pictures", leave=False) as bar:
        while (share := (time.perf_counter() - start) / 60 / minutes) < 1:
            optimizer.param_groups[0]["lr"] = peak_rate * (1 + math.cos(math.pi * share)) / 2
            batch = next(batches)
            loss = segmentation_loss(model(batch["image"]), batch["label"].float()).mean()
            if not loss.isfinite():
                raise TrainingDivergedError(f"the loss is {loss.item()} after {pictures_seen} pictures; change --seed")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pictures_seen += batch_size
            bar.update(batch_size)
    return pictures_seen, (time.perf_counter() - start) / 60


@torch.inference_mode()
def histograms(model: nn.Module, data: PairDataset) -> NDArray[np.int64]:
    """Returns the histograms of a split's soft masks, (N, 2, 256), see `utils.protocols.histogram`."""
    model.eval()
    samples = (data[0, index] for index in range(len(data)))
    return np.stack(
        [
            histogram(
                (model(each["image"][None]).sigmoid()[0] * 255).round().to(torch.uint8).numpy(),
                each["label"].numpy() > 0,
            )
            for each in samples
        ]
    )


@torch.inference_mode()
def score(model: nn.Module, data: PairDataset, threshold: float) -> list[PictureScore]:
    """Returns the scores of a split under the per-image protocol, at the data's resolution."""
    model.eval()
    scores = []
    for index, pair in enumerate(data.pairs):
        sample = data[0, index]
        soft = model(sample["image"].unsqueeze(0)).sigmoid()  # (1, H, W)
        mask = BinaryCodec().quantise(soft, threshold)[0].bool().numpy()
        prediction = (soft * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()  # (H, W, 3)
        scores.append(score_picture(prediction, mask, sample["label"].bool().numpy(), pair.name, pair.difficulty))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: trains, scores, prints the table of the test split and writes the JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    name, data = options.dataset_name, {}
    if LAYOUTS[name].palette:
        raise InputError(f"--dataset_name: these networks tell glass or not, the masks of {name} tell classes")
    for split in ("train", "validation", "test"):
        seed = options.seed if options.augmentation and split == "train" else None
        pairs = scan(name, options.data, split).pairs
        data[split] = PairDataset(pairs, LAYOUTS[name].read_label, options.resolution, augmentation_seed=seed)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("a").close()  # finds out before the training, and keeps what is there
    except OSError as error:
        raise InputError(f"--out: {options.out} cannot be written ({error.strerror}); choose another file") from error
    keep_freed_memory()  # as in the trainer
    torch.manual_seed(options.seed)
    network, peak_rate = NETWORKS[options.network]
    model = network()
    settings = (options.minutes, options.batch_size, options.seed, peak_rate)
    pictures_seen, minutes = train(model, data["train"], *settings)
    threshold = options.threshold
    if threshold == "validation":
        threshold, _ = best_threshold(iou_curves(histograms(model, data["validation"])))
    validation, test = (score(model, data[split], threshold) for split in ("validation", "test"))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.scratch", *arguments]),
        "machine": machine(),
        "minutes": round(minutes, 3),
        "pictures_seen": pictures_seen,
        "threshold": threshold,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": summarise(validation),
        "scores": summarise(test),
        "pictures": {f"{each.difficulty}/{each.name}": [each.iou, each.boundary_iou] for each in test},
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{options.network}, test split, after {pictures_seen} pictures in {minutes:.2f} minutes")
    print(format_table(summarise(test)))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.scratch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("assets/glass_sample"), help="the data set's root")
    parser.add_argument("--network", choices=NETWORKS, default="unet", help="[unet]")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time; scoring comes on top")
    parser.add_argument("--batch_size", type=partial(convert, "train_batch_size", where="--batch_size"), default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/scratch.json"), help="file for the results")
    for name, default in CONFIG_FLAGS.items():
        kind, meaning = partial(convert, name, where=f"--{name}"), FIELDS[name].metadata["meaning"]
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes: {options.minutes} is not valid, expected a number greater than 0")
    return options


if __name__ == "__main__":
    run_command(main)
