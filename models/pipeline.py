"""One Diffusers object, pictures in, masks out; validation, inference and users all call it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from diffusers.utils import BaseOutput

from dataset.codecs import Palette, build_codec
from models.latents import DOWNSCALE, LatentCodec
from models.mask_decoder import LightMaskDecoder
from models.objectives import build_objective
from models.prompt import EmptyPrompt
from utils.seeding import Stream, torch_generator

DEFAULT_BATCH_SIZE = 4
TILE_OVERLAP = 0.25  # of a tile's side, at least
# Test-time augmentation: (flipped, scale) of each view of a picture whose predictions are averaged.
VIEWS: dict[str, tuple[tuple[bool, float], ...]] = {
    "none": ((False, 1.0),),
    "flip": ((False, 1.0), (True, 1.0)),
    "flip_scale": tuple((flipped, scale) for scale in (1.0, 0.75, 1.25) for flipped in (False, True)),
}


@dataclass
class SegmentationOutput(BaseOutput):
    """What the pipeline returns for B pictures.

    Args:
        predictions: (B, 3, H, W), float32 in [0, 1]: the clamped decode, the mean over an ensemble's members. From a light
            mask decoder it is grey, the probability of glass.
        soft: (B, H, W), float32 in [0, 1]: the codec's reading of `predictions`.
        masks: (B, H, W), uint8 in {0, 1}: where `soft` exceeds the threshold.
        classes: (B, H, W), uint8: the class of each pixel of the masks, 0 outside; the masks themselves where there is but one.
        uncertainty: (B, H, W), float32: the standard deviation over the soft predictions of members and views, or None
            where there is but one by nature: a deterministic objective, without `tta`.
    """

    predictions: torch.Tensor
    soft: torch.Tensor
    masks: torch.Tensor
    classes: torch.Tensor
    uncertainty: torch.Tensor | None


class TransparencySegmentationPipeline(DiffusionPipeline):
    """Segments transparent objects in pictures.

    Args:
        transformer: fine-tuned.
        vae: of the base model.
        scheduler: of the base model; only its `shift` is used.
        prompt: the empty prompt that the transformer was trained with.
        mask_decoder: decodes predicted latents in the VAE's place, where the transformer was trained with one.
        objective: a key of `models.objectives.OBJECTIVES`.
        codec: one of `dataset.codecs.CODECS`.
        palette: of the palette codec, as `Palette.to_dict` gives it.
        resolution: side in pixels that the transformer was trained at.
        threshold: default for a call.
        denoise_steps: default for a call.
        ensemble_size: default for a call.
        tta: default for a call.
        weighting_scheme: of the training.
        logit_mean: of the training.
        logit_std: of the training.
        mode_scale: of the training.
        prediction: of the training.
    """

    model_cpu_offload_seq = "prompt->vae->transformer->mask_decoder"
    _optional_components = ["mask_decoder"]  # noqa: RUF012  as Diffusers declares it

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        prompt: EmptyPrompt,
        mask_decoder: LightMaskDecoder | None = None,
        objective: str = "end_to_end",
        codec: str = "binary",
        palette: Mapping[str, Any] | None = None,
        resolution: int = 1024,
        threshold: float = 0.5,
        denoise_steps: int = 20,
        ensemble_size: int = 5,
        tta: str = "none",
        weighting_scheme: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        prediction: str = "clean",
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, prompt=prompt, mask_decoder=mask_decoder
        )
        settings = {
            "weighting_scheme": weighting_scheme,
            "logit_mean": logit_mean,
            "logit_std": logit_std,
            "mode_scale": mode_scale,
            "prediction": prediction,
        }
        self.register_to_config(
            objective=objective,
            codec=codec,
            palette=palette,
            resolution=resolution,
            threshold=threshold,
            denoise_steps=denoise_steps,
            ensemble_size=ensemble_size,
            tta=tta,
            **settings,
        )
        self.objective = build_objective(objective, settings, scheduler.config.shift)
        self.latent_codec = LatentCodec(vae)
        self.palette = Palette.from_dict(palette) if palette else None
        self.codec = build_codec(codec, self.palette)

    @property
    def vae_device(self) -> torch.device:
        """Where the VAE computes, which is not where it lies while `enable_model_cpu_offload` keeps it away."""
        hook = getattr(self.vae, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.vae.device)

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Turns pictures into latents, and into the features that the mask decoder takes beside them.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Latents (B, C, H/8, W/8), float32, and the features of `LatentCodec.encode_with_features`, an empty list where the
            mask decoder takes none; on the VAE's device.
        """
        pixels = images.to(self.vae_device, non_blocking=True) * 2 - 1
        if self.mask_decoder is not None and self.mask_decoder.takes_features:
            return self.latent_codec.encode_with_features(pixels)
        return self.latent_codec.encode(pixels), []

    def encode_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns latents (B, C, H/8, W/8), float32, on the VAE's device, of labels (B, H, W), uint8."""
        return self.latent_codec.encode(self.codec.encode(labels.to(self.vae_device, non_blocking=True)))

    def decode_latents(self, latents: torch.Tensor, laterals: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Returns pixels (B, 3, 8h, 8w), float32, about [-1, 1], of predicted latents (B, C, h, w); gradients flow through.

        Args:
            latents: predicted.
            laterals: of the mask decoder, if it takes any.
        """
        if self.mask_decoder is None:
            return self.latent_codec.decode(latents)
        return self.codec.encode(self.mask_decoder(latents, laterals).sigmoid())

    def read_logits(self, latents: torch.Tensor, features: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Returns logits of the mask (B, 8h, 8w), float32, of predicted latents (B, C, h, w); gradients flow through.

        Args:
            latents: predicted.
            features: of `encode_images`.
        """
        if self.mask_decoder is None:
            return self.codec.logits(self.latent_codec.decode(latents))
        return self.mask_decoder(latents, self.mask_decoder.project(features))

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        threshold: float | None = None,
        denoise_steps: int | None = None,
        ensemble_size: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        tta: str | None = None,
        tile_size: int | None = None,
    ) -> SegmentationOutput:
        """Predicts masks for a batch of pictures of one size.

        Args:
            images: (B, 3, H, W), float in [0, 1], H and W multiples of 16.
            generator: CPU generators of the starting noise, one per picture (an ensemble's members draw from their
                picture's in turn) or one for all; None: seeded by the picture's position.
            threshold: in [0, 1]; None: the pipeline's.
            denoise_steps: Euler steps; None: the pipeline's. No effect on a deterministic objective.
            ensemble_size: members; None: the pipeline's. No effect on a deterministic objective.
            batch_size: members per forward pass.
            tta: a key of `VIEWS`: which views of each picture vote, as the members of an ensemble do; None: the pipeline's.
            tile_size: a multiple of 16; what is longer is predicted in overlapping tiles of this side, blended without seams.
                None: whole.

        Returns:
            Predictions, soft masks, masks and uncertainty on the CPU, in the order of the pictures.

        Raises:
            ValueError: if shapes, ranges or the number of generators do not fit.
        """
        side = DOWNSCALE * self.transformer.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"expected images (B, 3, H, W) with H and W multiples of {side}, got {tuple(images.shape)}"
            )
        threshold = self.config.threshold if threshold is None else threshold
        steps = self.config.denoise_steps if denoise_steps is None else denoise_steps
        members = self.config.ensemble_size if ensemble_size is None else ensemble_size
        tta = self.config.tta if tta is None else tta
        if tta not in VIEWS:
            raise ValueError(f"unknown tta {tta!r}; valid: {', '.join(VIEWS)}")
        if tile_size is not None and (tile_size < side or tile_size % side):
            raise ValueError(f"tile_size {tile_size} must be a multiple of {side}")
        if not 0 <= threshold <= 1 or min(steps, members, batch_size) < 1:
            raise ValueError(
                f"threshold {threshold} must lie in [0, 1], denoise_steps {steps}, ensemble_size {members} and batch_size "
                f"{batch_size} be at least 1"
            )
        members = members if self.objective.stochastic else 1
        generators = _one_per_picture(generator, len(images))
        predictions, soft, uncertainty = [], [], []
        views = []
        for flipped, scale in VIEWS[tta]:
            view = _resized(
                images.float(), [max(1, round(length * scale / side)) * side for length in images.shape[2:]]
            )
            view = view.flip(-1) if flipped else view
            pixels = self._predict_tiles(view, generators, members, steps, batch_size, tile_size)
            pixels = _resized(pixels.flip(-1) if flipped else pixels, list(images.shape[2:]))
            views.append(pixels.unflatten(0, (len(images), members)))
        classes = []
        for group in torch.cat(views, dim=1):  # (views x members, 3, H, W) of a picture
            member_soft = self.codec.decode(group)
            predictions.append((group.mean(dim=0) + 1) / 2)
            soft.append(member_soft.mean(dim=0))
            classes.append(self.codec.classes(group, self.codec.quantise(soft[-1], threshold)))
            uncertainty.append(member_soft.std(dim=0, correction=0))
        soft_masks = torch.stack(soft)
        return SegmentationOutput(
            predictions=torch.stack(predictions),
            soft=soft_masks,
            masks=self.codec.quantise(soft_masks, threshold),
            classes=torch.stack(classes),
            uncertainty=torch.stack(uncertainty) if self.objective.stochastic or len(views) > 1 else None,
        )

    def _predict_tiles(
        self,
        images: torch.Tensor,
        generators: Sequence[torch.Generator],
        members: int,
        steps: int,
        batch_size: int,
        tile_size: int | None,
    ) -> torch.Tensor:
        """Returns what `_predict` does, of tiles where a side is longer than one, each weighing less towards its edges."""
        height, width = images.shape[2:]
        rows, columns = (_tile_starts(length, tile_size or length) for length in (height, width))
        total, weights = torch.zeros(len(images) * members, 3, height, width), torch.zeros(height, width)
        for top, bottom in rows:
            for left, right in columns:
                tile = images[:, :, top:bottom, left:right]
                chunks = [slice(start, start + batch_size) for start in range(0, len(tile), batch_size)]
                pixels = torch.cat(
                    [self._predict(tile[chunk], generators[chunk], members, steps, batch_size) for chunk in chunks]
                )
                if len(rows) == len(columns) == 1:
                    return pixels
                weight = _tent(bottom - top)[:, None] * _tent(right - left)
                total[:, :, top:bottom, left:right] += weight * pixels
                weights[top:bottom, left:right] += weight
        return total / weights

    def _predict(
        self,
        images: torch.Tensor,
        generators: Sequence[torch.Generator],
        members: int,
        steps: int,
        batch_size: int,
    ) -> torch.Tensor:
        """Returns the clamped decode of all members, (B x members, 3, H, W), a picture's one after the other, on the CPU."""
        condition, features = self.encode_images(images)
        laterals = self.mask_decoder.project(features) if features else []
        del features  # large
        # Members of all pictures in one row, cut into forward passes: the noise does not depend on where the cuts fall.
        owners = [picture for picture in range(len(images)) for _ in range(members)]
        pixels = []
        for start in range(0, len(owners), batch_size):
            chunk = owners[start : start + batch_size]
            latents = self.objective.predict(
                self.transformer, condition[chunk], self.prompt, [generators[picture] for picture in chunk], steps
            )
            pixels.append(self.decode_latents(latents, [each[chunk] for each in laterals]).clamp(-1, 1).cpu())
        return torch.cat(pixels)


def _resized(pictures: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if list(pictures.shape[2:]) == list(size):
        return pictures
    return F.interpolate(pictures, tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _tile_starts(length: int, tile_size: int) -> list[tuple[int, int]]:
    """Returns (start, end) of the tiles along a side: evenly spread, neighbours sharing at least `TILE_OVERLAP` of a tile."""
    if length <= tile_size:
        return [(0, length)]
    count = 1 + math.ceil((length - tile_size) / (tile_size * (1 - TILE_OVERLAP)))
    starts = [round(number * (length - tile_size) / (count - 1)) for number in range(count)]
    return [(start, start + tile_size) for start in starts]


def _tent(length: int) -> torch.Tensor:
    """Returns weights (length,) in (0, 1] that fall off linearly over a tile's overlap with its neighbours."""
    distance = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1)).float()
    return (distance / max(1.0, TILE_OVERLAP * length)).clamp(max=1.0)


def _one_per_picture(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_pictures: int
) -> list[torch.Generator]:
    if generator is None:
        return [torch_generator(Stream.INFERENCE_NOISE, 0, position) for position in range(num_pictures)]
    if isinstance(generator, torch.Generator):
        return [generator] * num_pictures
    if len(generator) != num_pictures:
        raise ValueError(f"{len(generator)} generators for {num_pictures} pictures; give one, or one per picture")
    return list(generator)
