"""Latents of the training pairs, computed once and read from disk, so that the VAE never runs in a training step.

A cache is a folder with `cache.json`, the fingerprint of all that its latents depend on, and safetensors shards of
`image` (n, V, C, h, w) and `mask` (n, F, C, h, w) in fp16 and `label` (n, F, H, W/8), a bit a pixel: V versions of each picture, of which version v is flipped where v
is odd, and F flips of its mask. Shards are written beside and renamed when whole, so that filling goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.codecs import LabelReader
from dataset.trans10k import Pair, prepare_worker
from dataset.transforms import augment_photometry, flip, read_image, read_label
from utils.errors import InputError, InterruptedRunError, first_line
from utils.seeding import Stream, numpy_generator

FORMAT = 2  # raised when augmentation or layout change, so that older caches are refused
PAIRS_PER_SHARD = 32
INDEX_FILE_NAME = "cache.json"
PARTIAL_SUFFIX = ".part"
BYTES_PER_VALUE = 2

Encode = Callable[[torch.Tensor], torch.Tensor]


class LatentCache:
    """The folder of a cache.

    Args:
        folder: of this cache alone.
        pairs: of the training split.
        resolution: side in pixels.
        augmentation_seed: seeds the photometry of the versions; None: one version of each picture, unflipped.
        num_variants: versions of each picture and flip.
        fingerprints: of what else the latents depend on, by name, such as the VAE.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Sequence[Pair],
        resolution: int,
        augmentation_seed: int | None,
        num_variants: int,
        fingerprints: dict[str, Any],
    ) -> None:
        self.folder, self.pairs, self.resolution = folder, pairs, resolution
        self.augmentation_seed = augmentation_seed
        self.num_flips = 1 if augmentation_seed is None else 2
        self.num_versions = 1 if augmentation_seed is None else 2 * num_variants
        self.num_shards = -(-len(pairs) // PAIRS_PER_SHARD)
        self.fingerprint = {
            "format": FORMAT,
            "pictures and masks": fingerprint_of_files(pairs),
            "resolution": resolution,
            "augmentation": augmentation_seed is not None,
            "seed": augmentation_seed,
            "latent_cache_variants": self.num_versions // self.num_flips,
            **fingerprints,
        }

    def shard_path(self, shard: int) -> Path:
        """Returns the file of a shard."""
        return self.folder / f"latents-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def indices(self, shard: int) -> range:
        """Returns the pairs that a shard holds."""
        start = shard * PAIRS_PER_SHARD
        return range(start, min(start + PAIRS_PER_SHARD, len(self.pairs)))

    def claim(self) -> None:
        """Creates the folder, or checks that the one there is of the same fingerprint; called by one process.

        Raises:
            InputError: naming what differs, if it is stale; if it cannot be written.
        """
        path = self.folder / INDEX_FILE_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                except ValueError:
                    found = None
                found = found if isinstance(found, dict) else {}
                changed = [name for name in self.fingerprint if found.get(name) != self.fingerprint[name]]
                if changed:
                    raise InputError(
                        f"{self.folder}: a latent cache of other latents; changed since: {', '.join(changed)}. Remove that "
                        "folder, or set latent_cache_path to another"
                    )
                return
            if any(entry.suffix != PARTIAL_SUFFIX for entry in self.folder.iterdir()):
                raise InputError(
                    f"{self.folder}: holds other files than a latent cache; set latent_cache_path to another folder"
                )
            partial = _partial(path)
            partial.write_text(json.dumps(self.fingerprint, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror}); set latent_cache_path to another folder"
            ) from error

    def missing_shards(self) -> list[int]:
        """Returns the shards that are still to be written.

        Raises:
            InputError: naming the file, if one that is there cannot be read.
        """
        missing = []
        for shard in range(self.num_shards):
            path = self.shard_path(shard)
            if not path.is_file():
                missing.append(shard)
                continue
            with open_shard(path) as tensors:
                counts = {name: tensors.get_slice(name).get_shape()[:2] for name in tensors.keys()}  # noqa: SIM118
            count = len(self.indices(shard))
            expected = {"image": self.num_versions, "mask": self.num_flips, "label": self.num_flips}
            if counts != {name: [count, number] for name, number in expected.items()}:
                raise InputError(
                    f"{path}: not a shard of this latent cache; remove it and start again, it is then written"
                )
        return missing

    def remove_leftovers(self) -> None:
        """Removes what killed runs left half-written, once every shard is there."""
        if all(self.shard_path(shard).is_file() for shard in range(self.num_shards)):
            for path in self.folder.glob(f"*{PARTIAL_SUFFIX}"):
                path.unlink(missing_ok=True)

    def check_disk_space(self, missing: int, bytes_per_latent: int) -> None:
        """Compares what `missing` shards will need with what is free.

        Raises:
            InputError: if the disk is too small.
        """
        each = bytes_per_pair(self.num_versions, self.num_flips, self.resolution, bytes_per_latent)
        needed = missing * PAIRS_PER_SHARD * each
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.folder}: the latent cache needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; free some, "
                "set latent_cache_path to another disk, or lower latent_cache_variants"
            )

    def write_shard(self, shard: int, image: torch.Tensor, mask: torch.Tensor, label: torch.Tensor) -> None:
        """Writes the latents of a shard's pairs, (n, V, C, h, w) and (n, F, C, h, w), and their labels in {0, 1}, (n, F, H, W).

        Raises:
            InputError: if the disk is full.
        """
        path = self.shard_path(shard)
        partial = _partial(path)
        try:
            bits = torch.from_numpy(np.packbits(label.numpy(), axis=-1))
            save_file({"image": image.half().contiguous(), "mask": mask.half().contiguous(), "label": bits}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError) and path.is_file():
                return  # another run that fills the same cache was faster, and has tidied up
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full or "No space left" in str(error) else first_line(error)
            raise InputError(
                f"{path}: cannot be written ({reason}); free some space or set latent_cache_path to another disk, then start "
                "again: what is whole is kept"
            ) from error


def bytes_per_pair(num_versions: int, num_flips: int, resolution: int, bytes_per_latent: int) -> int:
    """Returns what a pair takes in a cache: latents of its versions and of the flips of its mask, and the flips' labels."""
    return (num_versions + num_flips) * bytes_per_latent + num_flips * resolution**2 // 8


def _partial(path: Path) -> Path:
    """Returns a name to write beside a file that no other run which fills the same cache has."""
    return path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


class _Versions(Dataset[dict[str, Any]]):
    """All versions of a pair, as the cache keeps them."""

    def __init__(self, cache: LatentCache, reader: LabelReader) -> None:
        self.cache, self.reader = cache, reader

    def __getitem__(self, index: int) -> dict[str, Any]:
        cache, pair = self.cache, self.cache.pairs[index]
        picture = read_image(pair.image_path, cache.resolution)
        label = read_label(pair.mask_path, self.reader, cache.resolution)
        images = [picture]
        if cache.augmentation_seed is not None:
            images = []
            for variant in range(cache.num_versions // 2):
                rng = numpy_generator(Stream.AUGMENTATION, cache.augmentation_seed, variant, index)
                changed = augment_photometry(picture, rng)
                images += [changed, flip(changed)]
        labels = [label] if cache.num_flips == 1 else [label, flip(label)]
        return {
            "image": torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]),
            "label": torch.stack([torch.from_numpy(label) for label in labels]),
        }


def fill(
    cache: LatentCache,
    reader: LabelReader,
    encode_images: Encode,
    encode_labels: Encode,
    *,
    batch_size: int,
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    poll_stop: Callable[[], int] = lambda: 0,
) -> None:
    """Writes the shards that are missing; the processes share them out.

    Args:
        cache: claimed.
        reader: the layout's mask reader.
        encode_images: pictures (B, 3, H, W), float32 in [0, 1], to latents (B, C, h, w).
        encode_labels: labels (B, H, W), uint8, to latents (B, C, h, w).
        batch_size: pictures per call of these.
        num_workers: loader processes.
        process_index: of this process.
        num_processes: in total.
        poll_stop: asked after every few pairs; a non-zero exit code ends the filling.

    Raises:
        InputError: if a file cannot be read or the disk is full; what is whole is kept.
        InterruptedRunError: if `poll_stop` asked for it.
    """
    missing = cache.missing_shards()
    # By number, because another process may be writing already while this one looks.
    mine = [shard for shard in missing if shard % num_processes == process_index]
    if not mine:
        return
    loader = DataLoader(
        _Versions(cache, reader),
        sampler=[index for shard in mine for index in cache.indices(shard)],
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
    )
    bar = tqdm(
        total=sum(len(cache.indices(shard)) for shard in mine),
        desc="caching latents",
        unit="pair",
        disable=process_index > 0,
    )
    samples = iter(loader)
    with bar:
        for shard in mine:
            latents: dict[str, list[torch.Tensor]] = {"image": [], "mask": [], "label": []}
            for pairs in _groups(cache.indices(shard), max(1, batch_size // cache.num_versions)):
                group = [next(samples) for _ in pairs]
                images = torch.cat([sample["image"] for sample in group]).split(batch_size)
                labels = torch.cat([sample["label"] for sample in group]).split(batch_size)
                latents["label"].append(torch.stack([sample["label"] for sample in group]))
                for name, encoded in (
                    ("image", [encode_images(chunk.float() / 255).cpu() for chunk in images]),
                    ("mask", [encode_labels(chunk).cpu() for chunk in labels]),
                ):
                    latents[name].append(torch.cat(encoded).unflatten(0, (len(group), -1)))
                bar.update(len(group))
                if code := poll_stop():
                    raise InterruptedRunError("stopped while caching latents; the shards that are whole are kept", code)
            if shard == mine[0]:  # the first latents tell how large they are
                cache.check_disk_space(len(missing), latents["image"][0][0, 0].numel() * BYTES_PER_VALUE)
            cache.write_shard(shard, *(torch.cat(latents[name]) for name in ("image", "mask", "label")))
    cache.remove_leftovers()


class CachedLatents(Dataset[dict[str, Any]]):
    """The training pairs as latents; indexed by (epoch, index) like `PairDataset`.

    Each epoch shows another version of a picture, all of them in turn from a place that differs between pictures.

    Args:
        cache: filled.
        seed: of the places.
    """

    def __init__(self, cache: LatentCache, seed: int) -> None:
        self.cache = cache
        self.places = numpy_generator(Stream.AUGMENTATION, seed).integers(0, cache.num_versions, len(cache.pairs))
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.cache.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Returns a sample.

        Args:
            key: (epoch, index).

        Returns:
            `image_latents` and `mask_latents`, float16 (C, h, w); `label` (H, W), uint8; `name`, `file`, `epoch` and `index`.

        Raises:
            InputError: naming the shard that cannot be read.
        """
        epoch, index = key
        shard, row = divmod(index, PAIRS_PER_SHARD)
        version = int(self.places[index] + epoch) % self.cache.num_versions
        if shard not in self._opened:
            self._opened[shard] = open_shard(self.cache.shard_path(shard)).__enter__()
        tensors, pair = self._opened[shard], self.cache.pairs[index]
        bits = tensors.get_slice("label")[row, version % self.cache.num_flips]  # (H, W/8); W is a multiple of 16
        return {
            "image_latents": tensors.get_slice("image")[row, version],
            "mask_latents": tensors.get_slice("mask")[row, version % self.cache.num_flips],
            "label": torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)),
            "name": pair.name,
            "file": str(pair.image_path),
            "epoch": epoch,
            "index": index,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files behind when sent to a loader process."""
        return {**self.__dict__, "_opened": {}}


def open_shard(path: Path) -> Any:
    """Opens a shard for reading slices of it.

    Raises:
        InputError: naming the file.
    """
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: a damaged shard of the latent cache ({first_line(error)}); remove it and start again, it is then written"
        ) from error


def fingerprint_of_files(pairs: Sequence[Pair]) -> str:
    """Returns a digest of the files' paths, sizes and times of change."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.image_path, pair.mask_path):
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _groups(indices: range, size: int) -> Iterator[range]:
    for start in range(indices.start, indices.stop, size):
        yield range(start, min(start + size, indices.stop))
