"""Pixels <-> latents: the only place that knows the VAE's shift and scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from utils.seeding import Stream, numpy_generator

DOWNSCALE = 8
NUM_FEATURES = 3  # resolutions above the latents'
CUT_SIDES = (0.3, 0.7)  # of a rectangle, as a share of the picture's
# The VAE's activations are its large part (about 1.5 GB for a picture of 1024 px in bf16), and a picture that size fills a GPU.
PIXELS_PER_CALL = 1024 * 1024


class LatentCodec:
    """Encodes pixels to normalised latents with a frozen VAE, and decodes them.

    Args:
        vae: with `scaling_factor` and `shift_factor` in its configuration.
        memory_format: in which it is handed pictures and latents.
    """

    def __init__(self, vae: AutoencoderKL, memory_format: torch.memory_format = torch.channels_last) -> None:
        self.vae, self.memory_format = vae, memory_format
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns `(z - shift_factor) * scaling_factor` for z the mode of the VAE's posterior, never a sample of it.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], H and W multiples of 8, any float dtype.

        Returns:
            Latents (B, C, H/8, W/8), float32.

        Raises:
            ValueError: if the shape is another.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % DOWNSCALE or pixels.shape[3] % DOWNSCALE:
            raise ValueError(
                f"expected pixels (B, 3, H, W) with H and W multiples of {DOWNSCALE}, got {tuple(pixels.shape)}"
            )
        chunks = pixels.split(max(1, PIXELS_PER_CALL // pixels[0, 0].numel()))
        with _without_autocast(pixels):
            modes = [
                self.vae.encode(chunk.to(self.vae.dtype, memory_format=self.memory_format)).latent_dist.mode()
                for chunk in chunks
            ]
        return (torch.cat(modes).float().contiguous() - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def encode_with_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns what `encode` does and, from the same pass, the VAE encoder's features at three resolutions, finest first.

        The features are what the encoder's first three blocks hand on before they halve the resolution, in the group norm that
        follows every block of the VAE, without its scale and bias: (B, c, H/2^k, W/2^k) for k = 0, 1, 2 and c of
        `feature_channels`, in the VAE's dtype. They are large, 470 MB for a picture of 1024 px with SD3.5's VAE in bf16.

        Args:
            pixels: as for `encode`.

        Raises:
            ValueError: if the shape is another.
        """
        blocks = [block.resnets[-1] for block in self.vae.encoder.down_blocks[:NUM_FEATURES]]
        groups = self.vae.config.norm_num_groups
        found: list[list[torch.Tensor]] = [[] for _ in blocks]

        def keep(store: list[torch.Tensor], output: torch.Tensor) -> None:
            with _without_autocast(output):
                store.append(F.group_norm(output, groups))

        handles = [
            block.register_forward_hook(lambda _module, _inputs, output, store=store: keep(store, output))
            for block, store in zip(blocks, found, strict=True)
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code does not notice hooks that come and go
                latents = self.encode(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return latents, [chunks[0] if len(chunks) == 1 else torch.cat(chunks) for chunks in found]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the decoded pixels of `latents / scaling_factor + shift_factor`; gradients flow through.

        Args:
            latents: (B, C, h, w), any float dtype.

        Returns:
            Pixels (B, 3, 8h, 8w), float32, about [-1, 1], not clamped.
        """
        z = latents.float() / self.scaling_factor + self.shift_factor
        chunks = z.split(max(1, PIXELS_PER_CALL // (DOWNSCALE**2 * z[0, 0].numel())))
        with _without_autocast(z):
            pixels = [
                self.vae.decode(chunk.to(self.vae.dtype, memory_format=self.memory_format)).sample.float().contiguous()
                for chunk in chunks
            ]
        return torch.cat(pixels)


def _without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Returns a context where a tensor lies; the norms that autocast computes in float32 would nearly double the VAE's memory."""
    return torch.autocast(tensor.device.type, enabled=False)


def feature_channels(vae: AutoencoderKL) -> list[int]:
    """Returns the channels of the features of `LatentCodec.encode_with_features`."""
    return list(vae.config.block_out_channels[:NUM_FEATURES])


def cut_and_mix(batch: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """Returns a batch in which a rectangle of some samples comes from the next sample (CutMix, arXiv 1905.04899).

    Latents are cut, since the VAE's are local, and features and labels at the same place. Whether and where is drawn from
    (seed, epoch, index).

    Args:
        batch: with `image_latents` and `mask_latents` (B, C, h, w), a list `features` of (B, c, ?h, ?w), `label` (B, 8h, 8w),
            and lists `epoch` and `index`.
        share: of the samples that are mixed, in [0, 1].
        seed: of the run.
    """
    latents = batch["image_latents"]
    count, _, height, width = latents.shape
    inside = torch.zeros(count, height, width, dtype=torch.bool)
    for number, (epoch, index) in enumerate(zip(batch["epoch"], batch["index"], strict=True)):
        rng = numpy_generator(Stream.CUTMIX, seed, epoch, index)
        if rng.random() < share:
            rows, columns = (round(side * rng.uniform(*CUT_SIDES)) for side in (height, width))
            top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
            inside[number, top : top + rows, left : left + columns] = True
    inside = inside.to(latents.device, non_blocking=True)[:, None]

    def mix(values: torch.Tensor) -> torch.Tensor:
        factor = values.shape[-1] // width
        place = inside.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        return torch.where(place, values.roll(-1, dims=0), values)

    mixed = {name: mix(batch[name]) for name in ("image_latents", "mask_latents")}
    return {
        **batch,
        **mixed,
        "features": [mix(each) for each in batch["features"]],
        "label": mix(batch["label"][:, None])[:, 0],
    }


class LatentBatches:
    """Batches with `image_latents` and `mask_latents`, float32, `features` and `label` on the device, from pictures or cached latents.

    On a GPU the next batch is copied and encoded on a stream of its own while the present one is trained on.

    Args:
        batches: with `label` (B, H, W) and `image` (B, 3, H, W) or both latents.
        encode_images: pictures to latents and a list of features.
        encode_labels: labels to latents.
        device: of the training.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Any]],
        encode_images: Callable[[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]],
        encode_labels: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self.batches, self.device = batches, device
        self.encode_images, self.encode_labels = encode_images, encode_labels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the batches in order."""
        if self.device.type != "cuda":
            yield from map(self._encode, self.batches)
            return
        stream, ahead = torch.cuda.Stream(self.device), None
        for batch in self.batches:
            with torch.cuda.stream(stream):
                encoded = self._encode(batch)
            if ahead is not None:
                yield ahead
            # What follows on the main stream waits for the encoding; its memory is not reused before it is done.
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(stream)
            for tensor in (
                *(encoded[name] for name in ("image_latents", "mask_latents", "label")),
                *encoded["features"],
            ):
                tensor.record_stream(main)
            ahead = encoded
        if ahead is not None:
            yield ahead

    def _encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in batch.items() if name != "image"}
        rest["label"] = batch["label"].to(self.device, non_blocking=True)
        if "image_latents" in batch:
            for name in ("image_latents", "mask_latents"):
                rest[name] = batch[name].to(self.device, non_blocking=True).float()
            return {**rest, "features": []}
        image_latents, features = self.encode_images(batch["image"])
        mask_latents = self.encode_labels(rest["label"])
        return {**rest, "image_latents": image_latents, "mask_latents": mask_latents, "features": features}
