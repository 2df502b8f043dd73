"""Builds the tiny base model: a small VAE, a light mask decoder for its latents, and a rectified-flow transformer on them.

`python -m models.tiny_base OUT --data ROOT [ROOT ...]` reads the training splits of data sets in the Trans10k layout. VAE and
transformer save their state beside OUT every few minutes and go on from it when started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from dataset.trans10k import LAYOUTS, Pair, PairDataset, scan
from dataset.transforms import read_image, read_label
from models import flow, mask_decoder
from models.base import MASK_DECODER, PROMPT_FILE_NAME, load_vae
from models.latents import LatentCodec
from models.mask_decoder import LightMaskDecoder
from models.objectives import call_transformer
from models.prompt import EmptyPrompt
from utils.errors import run_command
from utils.schedules import learning_rate_factor
from utils.seeding import Stream, torch_generator
from utils.tensors import load_optimizer, save_optimizer

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 128,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 1,  # at 128 px a mask needs every one of the 16 x 16 latents as a token
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 64,
    "dual_attention_layers": [0, 1, 2],
    "qk_norm": "rms_norm",
}
NUM_PROMPT_TOKENS = 2
MASK_DECODER_WIDTH = 64
WARM_UP_STEPS = 200
SHIFT = 3.0  # of the scheduler, as in SD3.5
NUM_VARIANTS = 8  # crops of each picture that the transformer is pretrained on
KL_WEIGHT = 1e-4
PICTURE_WEIGHT = 4.0  # masks are so easy that they would crowd the pictures out
COLOUR_WEIGHT = 100.0
LATENT_NOISE = 0.08  # of the latents' standard deviation: predicted latents are never exact, so decoding must forgive
EMA_DECAY = 0.999
CROPPED_SHARE = 0.85  # of the VAE's updates
SAVE_SECONDS = 120.0


def fit(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    folder: Path,
    data_type: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Minimises a loss with AdamW, warm-up and cosine decay; resumable.

    Args:
        model: trained in place.
        loss_at: returns the scalar loss of a step; draws only what (step) seeds, so that resuming changes nothing.
        steps: updates in total.
        learning_rate: at the peak.
        folder: where the state is kept.
        data_type: of the autocast on the CPU or GPU.

    Returns:
        The exponential moving average of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    start = 0
    if (folder / "progress.json").is_file():
        start = json.loads((folder / "progress.json").read_text())["step"]
        model.load_state_dict(load_file(folder / "model.safetensors"))
        average = load_file(folder / "average.safetensors")
        load_optimizer(optimizer, model.named_parameters(), folder / "optimizer.safetensors")
    device = next(model.parameters()).device
    average = {name: value.to(device) for name, value in average.items()}
    last_save = last_log = time.monotonic()
    recent: list[torch.Tensor] = []
    for step in range(start, steps):
        factor = learning_rate_factor(step, steps, WARM_UP_STEPS, "cosine", 0.5, 0.02)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        with torch.autocast(device.type, data_type, enabled=data_type != torch.float32):
            loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        recent.append(loss.detach())
        now = time.monotonic()
        if now - last_log > 20 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {torch.stack(recent).mean().item():.4f}", flush=True)
            last_log, recent = now, []
        if now - last_save > SAVE_SECONDS or step + 1 == steps:
            save_file(
                {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
            )
            save_file({name: value.contiguous() for name, value in average.items()}, folder / "average.safetensors")
            save_optimizer(optimizer, model.named_parameters(), folder / "optimizer.safetensors")
            (folder / "progress.json").write_text(json.dumps({"step": step + 1}))
            last_save = now
    return average


def read_pairs(roots: list[Path], split: str, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads all pictures and masks of a split into memory.

    Returns:
        Pictures (N, 3, H, W), uint8, and labels (N, H, W), uint8 in {0, 1}.
    """
    pairs: list[Pair] = [pair for root in roots for pair in scan("trans10k", root, split).pairs]
    reader = LAYOUTS["trans10k"].read_label
    images = np.stack([read_image(pair.image_path, resolution) for pair in pairs])
    labels = np.stack([read_label(pair.mask_path, reader, resolution) for pair in pairs])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def train_vae(
    images: torch.Tensor,
    labels: torch.Tensor,
    folder: Path,
    steps: int,
    batch_size: int,
    data_type: torch.dtype,
    seed: int,
) -> AutoencoderKL:
    """Trains the VAE on pictures and masks, and sets its shift and scale from the latents' statistics.

    Args:
        images: (N, 3, H, W), uint8.
        labels: (N, H, W), uint8 in {0, 1}; shown to the VAE as black and white pictures.
        folder: of the resumable state.
        steps: updates.
        batch_size: pictures per update; see the code for the share of masks.
        data_type: of the autocast.
        seed: of weights and draws.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(_device()).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        generator = torch_generator(Stream.TRAINING_NOISE, seed, 0, step)
        full = images.shape[-1]
        # Crops cost a quarter, and all but the attention in the middle is local; the last part sees whole pictures.
        side, count = (full // 2, 4) if step < CROPPED_SHARE * steps else (full, 1)
        num_images, num_masks = count * batch_size // 2, count * batch_size // 4
        pixels = _draw(images, num_images, side, generator) / 127.5 - 1
        masks = _draw(labels[:, None], num_masks, side, generator) * 2.0 - 1
        batch = torch.cat([pixels, masks.expand(-1, 3, -1, -1)]).to(_device(), memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mode()
        # A regressed latent is a mean over the masks that a picture may have, so mixed latents must decode to mixed masks.
        shares = torch.rand(num_masks, 1, 1, 1, generator=generator)
        shares[::2] = 1.0
        weights = torch.cat([torch.ones(num_images, 1, 1, 1), shares]).to(latents.device)
        latents, batch = (weights * x + (1 - weights) * x.roll(1, dims=0) for x in (latents, batch))
        # Masks alone: on pictures it would hide what varies little, such as green against purple.
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noise[:num_images] = 0
        decoded = vae.decode(latents + noise * LATENT_NOISE * latents.detach().float().std()).sample.float()
        error = (decoded - batch).abs()
        # Fine detail (refraction, edges) is what the task needs and what a plain pixel error neglects.
        detail = sum((decoded - batch)[:num_images].diff(dim=axis).abs().mean() for axis in (2, 3)) * PICTURE_WEIGHT / 2
        # Colour is a small part of the error, and the absolute error is content with grey where most pictures are grey.
        tint = (decoded - batch)[:num_images]
        colour = (tint - tint.mean(dim=1, keepdim=True)).square().mean() * COLOUR_WEIGHT
        # The prior acts on the mode alone: it only keeps the latents' scale from drifting.
        prior = latents.float().square().mean()
        return (
            PICTURE_WEIGHT * error[:num_images].mean() + error[num_images:].mean() + detail + colour + KL_WEIGHT * prior
        )

    vae.load_state_dict(fit(vae, loss_at, steps, 1.5e-3, folder, data_type))
    with torch.no_grad():
        sample = torch.linspace(0, len(images) - 1, min(len(images), 400)).long()
        stacked = [
            vae.encode(batch.to(_device())).latent_dist.mode()
            for batch in torch.cat(
                [images[sample] / 127.5 - 1, labels[sample][:, None].expand(-1, 3, -1, -1) * 2.0 - 1]
            ).split(32)
        ]
    latents = torch.cat(stacked)
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    return vae.eval().requires_grad_(False)


def train_decoder(vae: AutoencoderKL, arguments: argparse.Namespace) -> LightMaskDecoder:
    """Trains the light mask decoder on the pairs of the data sets; takes minutes and keeps no state.

    Args:
        vae: frozen.
        arguments: of the command line.
    """
    layout = LAYOUTS["trans10k"]
    pairs = [pair for root in arguments.data for pair in scan("trans10k", root, "train").pairs]
    return mask_decoder.train(
        vae,
        PairDataset(pairs, layout.read_label, arguments.resolution, augmentation_seed=arguments.seed),
        layout.codec,
        width=MASK_DECODER_WIDTH,
        lateral=False,
        steps=arguments.mask_decoder_steps,
        batch_size=2 * arguments.batch_size,
        peak_rate=2e-3,
        seed=arguments.seed,
    )


def pretrain_transformer(
    images: torch.Tensor,
    vae: AutoencoderKL,
    folder: Path,
    steps: int,
    batch_size: int,
    data_type: torch.dtype,
    seed: int,
    compiled: bool = False,
) -> tuple[SD3Transformer2DModel, EmptyPrompt]:
    """Pretrains the transformer as an unconditional rectified-flow generator of the pictures' latents.

    Args:
        images: training pictures (N, 3, H, W), uint8.
        vae: frozen.
        folder: of the resumable state.
        steps: updates.
        batch_size: pictures per update.
        data_type: of the autocast.
        seed: of weights and draws.
        compiled: whether to run the transformer through torch.compile.
    """
    torch.manual_seed(seed + 1)
    transformer = SD3Transformer2DModel(**TRANSFORMER_CONFIG).to(_device())
    prompt = EmptyPrompt.from_tensors(
        torch.randn(1, NUM_PROMPT_TOKENS, TRANSFORMER_CONFIG["joint_attention_dim"]),
        torch.randn(1, TRANSFORMER_CONFIG["pooled_projection_dim"]),
    ).to(_device())
    if compiled:
        transformer.compile()
    codec = LatentCodec(vae)
    latents = torch.cat(
        [codec.encode(chunk.to(_device()) / 127.5 - 1).cpu() for chunk in _varied(images, seed).split(64)]
    )

    def loss_at(step: int) -> torch.Tensor:
        generator = torch_generator(Stream.TRAINING_NOISE, seed, 1, step)
        clean = latents[torch.randint(len(latents), (batch_size,), generator=generator)].to(_device())
        u = torch.sigmoid(torch.randn(batch_size, generator=generator))
        # Not shifted: small latents need less noise, and what is learnt at little noise is what a segmenter can use.
        sigmas = u.view(-1, 1, 1, 1).to(_device())
        noise = torch.randn(clean.shape, generator=generator).to(_device())
        # Half of the batch is not told its noise level but shown the timestep at which end-to-end training will read the
        # transformer, so that its features of clean pictures are at hand there too.
        told = torch.rand(batch_size, generator=generator).to(_device()) < 0.5
        timesteps = torch.where(told, flow.timesteps_from_sigmas(sigmas), flow.NUM_TRAIN_TIMESTEPS)
        model_pred = call_transformer(transformer, flow.add_noise(clean, noise, sigmas), timesteps, prompt)
        return (model_pred - flow.velocity(clean, noise)).square().mean()

    transformer.load_state_dict(fit(transformer, loss_at, steps, 1e-3, folder, data_type))
    return transformer, prompt


def mask_round_trip_iou(vae: AutoencoderKL, labels: torch.Tensor) -> float:
    """Returns the mean per-image IoU of masks (N, H, W), uint8 in {0, 1}, decoded from their own latents."""
    codec, scores = LatentCodec(vae), []
    for chunk in labels.split(32):
        pixels = chunk[:, None].expand(-1, 3, -1, -1).to(_device()) * 2.0 - 1
        decoded = codec.decode(codec.encode(pixels)).mean(dim=1).cpu() > 0
        both, either = (decoded & (chunk == 1)).sum((1, 2)), (decoded | (chunk == 1)).sum((1, 2))
        scores.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
    return torch.cat(scores).mean().item()


def _draw(pictures: torch.Tensor, count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Returns random crops (count, C, side, side), float32, each flipped with probability one half."""
    corners = torch.randint(0, pictures.shape[-1] - side + 1, (count, 2), generator=generator).tolist()
    chosen = torch.randint(len(pictures), (count,), generator=generator).tolist()
    flips = (torch.rand(count, generator=generator) < 0.5).tolist()
    crops = [
        pictures[index, :, top : top + side, left : left + side]
        for index, (top, left) in zip(chosen, corners, strict=True)
    ]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)]).float()


def _varied(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns NUM_VARIANTS random resized crops of every picture, half of them flipped; uint8, the same size."""
    generator = torch_generator(Stream.AUGMENTATION, seed)
    side, variants = images.shape[-1], []
    for variant in range(NUM_VARIANTS):
        for image in images:
            crop_side = side if variant < 2 else int(side * (0.6 + 0.4 * torch.rand((), generator=generator).item()))
            crop = _draw(image[None], 1, crop_side, generator)
            resized = torch.nn.functional.interpolate(crop, (side, side), mode="bilinear", antialias=True)
            variants.append(resized.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(variants)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Command line: builds the tiny base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the base model; states lie beside it, in OUT.work")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data sets whose training splits are read")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels [128]")
    parser.add_argument("--vae_steps", type=int, default=8500, help="updates of the VAE [8500]")
    parser.add_argument("--mask_decoder_steps", type=int, default=600, help="updates of the mask decoder [600]")
    parser.add_argument("--transformer_steps", type=int, default=4500, help="updates of the transformer [4500]")
    parser.add_argument("--batch_size", type=int, default=8, help="of the VAE; the transformer takes 4x [8]")
    parser.add_argument(
        "--data_type", choices=("fp32", "bf16"), default="bf16", help="precision of the training [bf16]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and draws [0]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer; needs a C++ compiler")
    parser.add_argument("--check", action="store_true", help="only score how test masks survive the VAE of OUT")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.data_type == "bf16" else torch.float32
    work = arguments.out.with_name(arguments.out.name + ".work")
    if arguments.check:
        _, labels = read_pairs(arguments.data, "test", arguments.resolution)
        iou = mask_round_trip_iou(load_vae(arguments.out, torch.float32).to(_device()), labels)
        print(f"{len(labels)} test masks survive the VAE with a mean IoU of {iou:.4f}")
        return
    images, labels = read_pairs(arguments.data, "train", arguments.resolution)
    print(f"{len(images)} training pairs", flush=True)
    if not (arguments.out / "vae").is_dir():
        vae = train_vae(images, labels, work / "vae", arguments.vae_steps, arguments.batch_size, dtype, arguments.seed)
        print(f"masks survive the VAE with IoU {mask_round_trip_iou(vae, labels):.4f}", flush=True)
        # Half precision halves the download; loading casts to the precision that is asked for.
        vae.half().save_pretrained(work / "vae.part")
        arguments.out.mkdir(parents=True, exist_ok=True)
        (work / "vae.part").replace(arguments.out / "vae")
    vae = load_vae(arguments.out, torch.float32).to(_device())
    if not (arguments.out / MASK_DECODER).is_dir():
        train_decoder(vae, arguments).half().save_pretrained(work / "mask_decoder.part")
        (work / "mask_decoder.part").replace(arguments.out / MASK_DECODER)
    transformer, prompt = pretrain_transformer(
        images,
        vae,
        work / "transformer",
        arguments.transformer_steps,
        4 * arguments.batch_size,
        dtype,
        arguments.seed,
        arguments.compile,
    )
    transformer.half().save_pretrained(arguments.out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(arguments.out / "scheduler")
    prompt.save_file(arguments.out / PROMPT_FILE_NAME)


if __name__ == "__main__":
    run_command(main)
