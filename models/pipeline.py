"""One Diffusers object, pictures in, masks out; validation, inference and users all call it."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from diffusers.utils import BaseOutput
from huggingface_hub import HfApi
from numpy.typing import NDArray

from dataset.codecs import Palette, build_codec
from dataset.pictures import Picture, as_pictures, as_rgb, squash
from models.base import (
    MASK_DECODER,
    MODEL_PARTS,
    check_prompt,
    largest_side,
    load_part,
    load_scheduler,
    load_transformer,
    load_vae,
    resolve_base,
)
from models.card import model_card
from models.latents import DOWNSCALE, LatentCodec
from models.mask_decoder import LightMaskDecoder, load_mask_decoder
from models.objectives import build_objective
from models.prompt import EmptyPrompt
from models.tiles import predict_tiles, resized
from utils.config import FIELDS, convert
from utils.errors import CommandError, InputError, first_line
from utils.seeding import Stream, torch_generator

DEFAULT_BATCH_SIZE = 4
INDEX_FILE_NAME = "model_index.json"
# Test-time augmentation: (flipped, scale) of each view of a picture whose predictions are averaged.
VIEWS: dict[str, tuple[tuple[bool, float], ...]] = {
    "none": ((False, 1.0),),
    "flip": ((False, 1.0), (True, 1.0)),
    "flip_scale": tuple((flipped, scale) for scale in (1.0, 0.75, 1.25) for flipped in (False, True)),
}


@dataclass
class Segmentation(BaseOutput):
    """What the pipeline returns for pictures: one entry for each, in their order, each in its picture's own size (H, W).

    Args:
        masks: (H, W), uint8 in {0, 1}: where `soft` exceeds the threshold.
        soft: (H, W), float32 in [0, 1]: how sure each pixel is transparent.
        classes: (H, W), uint8: the class of each pixel of the mask, 0 outside; the mask itself where there is but one.
        uncertainty: (H, W), float32 in [0, 0.5]: the standard deviation over members and views, or None where there is but
            one by nature: a deterministic objective, without `tta`.
    """

    masks: list[NDArray[np.uint8]]
    soft: list[NDArray[np.float32]]
    classes: list[NDArray[np.uint8]]
    uncertainty: list[NDArray[np.float32]] | None


@dataclass
class SegmentationOutput(BaseOutput):
    """What `TransparencySegmentationPipeline.predict` returns for B pictures of one size.

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
        training: what the model card tells of the run, as `utils.publishing.describe_training` gives it.
    """

    # The VAE encodes before the transformer and decodes after it, and is the smaller of the two to leave on the card meanwhile.
    model_cpu_offload_seq = "transformer->vae->mask_decoder"
    _exclude_from_cpu_offload = ["prompt"]  # noqa: RUF012  it is read, never called, so that no hook would bring it
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
        training: Mapping[str, Any] | None = None,
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
            training=training,
            **settings,
        )
        self.objective = build_objective(objective, settings, scheduler.config.shift)
        self.latent_codec = LatentCodec(vae)
        self.palette = Palette.from_dict(palette) if palette else None
        self.codec = build_codec(codec, self.palette)

    @classmethod
    def from_pretrained(  # unlike Diffusers' own, which imports what a folder names
        cls, model: str | Path, torch_dtype: torch.dtype = torch.float32, revision: str | None = None, **overrides: Any
    ) -> Self:
        """Loads a pipeline from what `save_pretrained` or `push_to_hub` wrote; no code is run from it, no pickle read.

        Args:
            model: a folder, or a hub id.
            torch_dtype: of the weights.
            revision: branch, tag or commit on the hub.
            overrides: arguments of this class other than its parts, such as `threshold`, in the place of the stored ones.

        Raises:
            InputError: naming the file, if the folder is no such pipeline, or broken.
            TypeError: for an override that is no argument.
        """
        if not isinstance(torch_dtype, torch.dtype):
            raise TypeError(f"torch_dtype {torch_dtype!r} is no torch.dtype")
        if unknown := overrides.keys() - inspect.signature(cls).parameters.keys():
            raise TypeError(f"{min(unknown)!r} is no argument of {cls.__name__}")
        folder = resolve_base(str(model), (*MODEL_PARTS, "prompt"), "model", (INDEX_FILE_NAME,), revision)
        index = folder / INDEX_FILE_NAME
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            class_name = content["_class_name"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{index}: cannot be read ({first_line(error)}); write the folder with: python -m utils.publishing"
            ) from error
        if class_name != cls.__name__:
            raise InputError(f"{index}: is a {class_name}, not a {cls.__name__}")
        # Which class reads which part is known here, whatever the index names.
        vae = load_vae(folder, torch_dtype)
        transformer = load_transformer(folder, torch_dtype).eval()
        prompt = load_part(EmptyPrompt, folder, "prompt", torch_dtype)
        check_prompt(prompt, transformer)
        has_decoder = (folder / MASK_DECODER).is_dir()
        decoder = load_mask_decoder(folder / MASK_DECODER, vae, torch_dtype).eval() if has_decoder else None
        parts = {"transformer", "vae", "scheduler", "prompt", MASK_DECODER}
        settings = {name: value for name, value in content.items() if name not in parts and not name.startswith("_")}
        settings = _checked(index, cls, settings | overrides)
        try:
            pipeline = cls(transformer, vae, load_scheduler(folder), prompt, decoder, **settings)
            needed, there = (
                pipeline.objective.in_channels_factor * transformer.out_channels,
                transformer.config.in_channels,
            )
            if there != needed:
                raise ValueError(
                    f"objective {pipeline.config.objective} needs {needed} input channels, the transformer has {there}"
                )
            return pipeline
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise InputError(f"{index}: cannot be used ({first_line(error)})") from error

    def save_pretrained(self, save_directory: str | Path, max_shard_size: int | str | None = None) -> None:
        """Writes the pipeline as a folder with a model card; weights as safetensors that who may read the folder may read.

        Args:
            save_directory: to write.
            max_shard_size: of a file of weights, in bytes or as "5GB".
        """
        super().save_pretrained(save_directory, safe_serialization=True, max_shard_size=max_shard_size)
        card = Path(save_directory) / "README.md"
        card.write_text(model_card(dict(self.config)), encoding="utf-8")
        for weights in Path(save_directory).rglob("*.safetensors"):
            weights.chmod(card.stat().st_mode)

    def push_to_hub(  # Diffusers' own puts an empty card in this one's place
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload pipeline",
    ) -> str:
        """Uploads the folder that `save_pretrained` writes, model card included.

        Args:
            repo_id: OWNER/NAME; made if it does not exist.
            private: whether a new repository is; None: the account's default.
            token: of the hub; None: the login's.
            commit_message: of the upload.

        Returns:
            The address of the model.
        """
        hub = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            made = hub.create_repo(repo_id, private=private, exist_ok=True)
            hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
        return str(made)

    @property
    def side_of_token(self) -> int:
        """Side in pixels of a token's square, of which the sides of pictures and tiles are multiples."""
        return int(DOWNSCALE * self.transformer.config.patch_size)

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
        images: Picture | Sequence[Picture],
        resolution: int | Literal["own"] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        threshold: float | None = None,
        denoise_steps: int | None = None,
        ensemble_size: int | None = None,
        tta: str | None = None,
        tile_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Segmentation:
        """Segments pictures of any kind, size and mode.

        Args:
            images: a picture or a list of them, see `dataset.pictures.as_rgb`; a batch (N, H, W, C) or (N, C, H, W) is N pictures.
            resolution: side in pixels of the square that each picture is squashed to, a multiple of 16; None: that of the
                training; `own`: each picture's own size, in tiles.
            batch_size: pictures, and members of an ensemble, per forward pass.
            threshold: in [0, 1]; None: the pipeline's.
            denoise_steps: Euler steps of a diffusion model; None: the pipeline's.
            ensemble_size: members of a diffusion model; None: the pipeline's.
            tta: a key of `VIEWS`: which views of each picture vote; None: the pipeline's.
            tile_size: a multiple of 16; what is longer is predicted in overlapping tiles of this side. None: whole, or with
                `resolution="own"` tiles of the training's resolution.
            generator: CPU generators of the starting noise, one per picture or one for all; None: seeded by the picture's position.

        Returns:
            Lists, even for a single picture, in the order of the pictures, each entry in its picture's own size.

        Raises:
            InputError: naming the picture, if it cannot be read.
            ValueError: if a setting is out of range.
            CommandError: if a prediction is not finite.

        @public
        """
        pictures = as_pictures(images)
        generators = _one_per_picture(generator, len(pictures))
        if resolution == "own" and tile_size is None:
            tile_size = self.config.resolution
        self.check_call(resolution, batch_size, tta, tile_size)
        found = Segmentation([], [], [], [])
        together = batch_size if resolution != "own" else 1
        for start in range(0, len(pictures), together):
            some = pictures[start : start + together]
            arrays = [as_rgb(picture, f"picture {start + number}") for number, picture in enumerate(some)]
            batch = np.stack([squash(array, *self._prediction_size(array, resolution)) for array in arrays])
            output = self.predict(
                torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255,
                generators[start : start + together],
                threshold,
                denoise_steps,
                ensemble_size,
                batch_size,
                tta,
                tile_size,
            )
            for number, array in enumerate(arrays):
                self._add_in_own_size(found, output, number, array.shape[:2], threshold)
        return found

    @torch.no_grad()
    def predict(
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
        """Predicts masks for a batch of pictures at the size they have; calling the pipeline takes any pictures.

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
        side = self.side_of_token
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"expected images (B, 3, H, W) with H and W multiples of {side}, got {tuple(images.shape)}"
            )
        threshold = self.config.threshold if threshold is None else threshold
        steps = self.config.denoise_steps if denoise_steps is None else denoise_steps
        members = self.config.ensemble_size if ensemble_size is None else ensemble_size
        tta = self._check_views(tta, tile_size)
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
            size = [max(1, round(length * scale / side)) * side for length in images.shape[2:]]
            view = resized(images.float(), size)
            view = view.flip(-1) if flipped else view
            predict = partial(
                self._predict_chunks, generators=generators, members=members, steps=steps, batch_size=batch_size
            )
            pixels = predict_tiles(predict, view, members, tile_size)
            pixels = resized(pixels.flip(-1) if flipped else pixels, list(images.shape[2:]))
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

    def _predict_chunks(
        self,
        images: torch.Tensor,
        generators: Sequence[torch.Generator],
        members: int,
        steps: int,
        batch_size: int,
    ) -> torch.Tensor:
        """Returns what `_predict` does, without encoding more than `batch_size` pictures at a time."""
        chunks = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        return torch.cat(
            [self._predict(images[chunk], generators[chunk], members, steps, batch_size) for chunk in chunks]
        )

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

    def check_call(
        self, resolution: int | Literal["own"] | None, batch_size: int, tta: str | None, tile_size: int | None
    ) -> None:
        """Holds settings of a call against what the transformer takes; see `__call__`.

        Raises:
            ValueError: naming the first that does not fit.
        """
        side = self.side_of_token
        tta = self._check_views(tta, tile_size)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if isinstance(resolution, int) and (resolution < side or resolution % side):
            raise ValueError(f"resolution {resolution} must be a multiple of {side}")
        largest = largest_side(self.transformer.config)
        wanted = resolution if isinstance(resolution, int) else self.config.resolution
        wanted = max(round(wanted * scale / side) * side for _, scale in VIEWS[tta])
        if tile_size is not None:
            wanted = tile_size if resolution == "own" else min(tile_size, wanted)
        if wanted > largest:
            raise ValueError(
                f"a side of {wanted} pixels (resolution, views and tile_size together) is more than the {largest} that this base "
                "takes; give a smaller tile_size"
            )

    def _check_views(self, tta: str | None, tile_size: int | None) -> str:
        """Returns the key of `VIEWS` that a call means, after a look at it and at the side of the tiles."""
        side = self.side_of_token
        tta = self.config.tta if tta is None else tta
        if tta not in VIEWS:
            raise ValueError(f"unknown tta {tta!r}; valid: {', '.join(VIEWS)}")
        if tile_size is not None and (tile_size < side or tile_size % side):
            raise ValueError(f"tile_size {tile_size} must be a multiple of {side}")
        return tta

    def _prediction_size(self, picture: NDArray[np.uint8], resolution: int | Literal["own"] | None) -> tuple[int, int]:
        """Returns the height and width at which a picture is predicted."""
        if resolution != "own":
            side = self.config.resolution if resolution is None else resolution
            return side, side
        step = self.side_of_token
        height, width = (max(1, round(length / step)) * step for length in picture.shape[:2])
        return height, width

    def _add_in_own_size(
        self, found: Segmentation, output: SegmentationOutput, number: int, size: Sequence[int], threshold: float | None
    ) -> None:
        """Adds what was predicted of picture `number` to `found`, resized to (height, width)."""
        one = slice(number, number + 1)
        soft = resized(output.soft[one, None], size)[0]  # (1, H, W)
        if not soft.isfinite().all():
            raise CommandError(
                "the prediction is not finite; compute in another precision (bf16 or fp32), or look whether the training diverged"
            )
        mask = self.codec.quantise(soft, self.config.threshold if threshold is None else threshold)
        found.soft.append(soft[0].numpy())
        found.masks.append(mask[0].numpy())
        if self.palette is None:
            found.classes.append(found.masks[-1])
        else:
            pixels = resized(output.predictions[one], size) * 2 - 1
            found.classes.append(self.codec.classes(pixels, mask[0]).numpy())
        if output.uncertainty is None or found.uncertainty is None:
            found.uncertainty = None
        else:
            found.uncertainty.append(resized(output.uncertainty[one, None], size)[0, 0].numpy())


def _checked(index: Path, pipeline_class: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of a pipeline, those that are keys of the configuration held to its types and ranges.

    Raises:
        InputError: naming the first that is unknown or not valid.
    """
    known = inspect.signature(pipeline_class).parameters
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise InputError(f"{index}: {name!r} is no setting of this pipeline")
        is_key = name in FIELDS and name != "palette"
        checked[name] = convert(name, value, f"{index}: {name}") if is_key else value
    if isinstance(checked.get("threshold"), str) or not isinstance(checked.get("training") or {}, Mapping):
        raise InputError(f"{index}: threshold must be a number, training a table")
    return checked


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
