"""The latent cache holds what the VAE gives, goes on where it stopped, and refuses what it does not fit."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset import latent_cache
from dataset.latent_cache import INDEX_FILE_NAME, CachedLatents, LatentCache, fill
from dataset.trans10k import LAYOUTS, Pair, collate, scan
from dataset.transforms import augment_photometry, flip, read_image, read_label
from tests.conftest import RESOLUTION, Launch
from utils.errors import InputError, InterruptedRunError
from utils.history import read_history
from utils.seeding import Stream, numpy_generator

READER = LAYOUTS["trans10k"].read_label
SEED, VARIANTS = 7, 3


def encode_images(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for the VAE that keeps every pixel: (B, 3, H, W) in [0, 1] -> (B, 3, H, W)."""
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    return images * 2


def encode_labels(labels: torch.Tensor) -> torch.Tensor:
    assert labels.dtype == torch.uint8
    return labels[:, None].float() - 1


@pytest.fixture
def pairs(trans10k: Path) -> list[Pair]:
    return scan("trans10k", trans10k, "train").pairs


MakeCache = Callable[..., LatentCache]


@pytest.fixture
def make_cache(pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCache:
    monkeypatch.setattr(latent_cache, "PAIRS_PER_SHARD", 4)  # 6 pairs: a whole shard and a shorter one

    def make(**changes: object) -> LatentCache:
        settings = {
            "folder": tmp_path / "cache",
            "pairs": pairs,
            "resolution": RESOLUTION,
            "augmentation_seed": SEED,
            "num_variants": VARIANTS,
            "fingerprints": {"VAE": "abc"},
        }
        return LatentCache(**{**settings, **changes})

    return make


def fill_up(cache: LatentCache, **changes: object) -> None:
    cache.claim()
    fill(cache, READER, encode_images, encode_labels, **{"batch_size": 5, **changes})


def expected(pair: Pair, index: int, version: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = numpy_generator(Stream.AUGMENTATION, SEED, version // 2, index)
    image = augment_photometry(read_image(pair.image_path, RESOLUTION), rng)
    label = read_label(pair.mask_path, READER, RESOLUTION)
    if version % 2:
        image, label = flip(image), flip(label)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    return encode_images(pixels)[0].half(), encode_labels(torch.from_numpy(label)[None])[0].half()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_version_is_what_the_vae_gives_for_the_augmented_pair(
    batch_size: int, make_cache: MakeCache, pairs: list[Pair]
) -> None:
    cache = make_cache()
    fill_up(cache, batch_size=batch_size)
    data = CachedLatents(cache, SEED)
    assert len(data) == 6
    seen = []
    for index, pair in enumerate(pairs):
        for epoch in range(2 * VARIANTS):
            version = int(data.places[index] + epoch) % (2 * VARIANTS)
            sample = data[epoch, index]
            for found, wanted in zip(
                (sample["image_latents"], sample["mask_latents"]), expected(pair, index, version), strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            # The stand-in's mask latents are the label less one.
            assert sample["label"].equal((sample["mask_latents"][0] + 1).to(torch.uint8))
            assert (sample["name"], sample["file"], sample["epoch"]) == (pair.name, str(pair.image_path), epoch)
            seen.append((index, version))
    assert sorted(seen) == [(index, version) for index in range(6) for version in range(2 * VARIANTS)]


def test_without_augmentation_there_is_one_version(make_cache: MakeCache, pairs: list[Pair]) -> None:
    cache = make_cache(augmentation_seed=None)
    fill_up(cache)
    data = CachedLatents(cache, SEED)
    image = torch.from_numpy(read_image(pairs[5].image_path, RESOLUTION)).permute(2, 0, 1)[None].float() / 255
    for epoch in (0, 1, 5):
        torch.testing.assert_close(data[epoch, 5]["image_latents"], encode_images(image)[0].half(), rtol=0, atol=0)
    assert cache.num_versions == cache.num_flips == 1


def test_samples_collate_and_survive_the_way_to_a_loader_process(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill_up(cache)
    data = CachedLatents(cache, SEED)
    first = data[0, 0]  # opens a file, which cannot travel
    assert pickle.dumps(data)
    copy = deepcopy(data)  # by way of the same state
    batch = collate([copy[0, 0], copy[0, 5]])
    assert batch["image_latents"].shape == (2, 3, RESOLUTION, RESOLUTION)
    assert batch["mask_latents"].shape == (2, 1, RESOLUTION, RESOLUTION)
    torch.testing.assert_close(batch["image_latents"][0], first["image_latents"])


def test_filling_goes_on_where_it_stopped(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.claim()
    encoded = 0

    def stop_in_the_second_shard() -> int:
        nonlocal encoded
        encoded += 1
        return 143 if encoded == 5 else 0

    with pytest.raises(InterruptedRunError, match="the shards that are whole are kept"):
        fill(cache, READER, encode_images, encode_labels, batch_size=1, poll_stop=stop_in_the_second_shard)
    assert cache.missing_shards() == [1]
    before = cache.shard_path(0).stat().st_mtime_ns
    cache.shard_path(1).with_suffix(".part").write_bytes(b"half")
    again = make_cache()
    fill_up(again)
    assert again.missing_shards() == []
    assert cache.shard_path(0).stat().st_mtime_ns == before
    assert not list(cache.folder.glob("*.part"))


def test_processes_share_the_shards_out(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.claim()
    fill(cache, READER, encode_images, encode_labels, batch_size=4, process_index=1, num_processes=2)
    assert cache.missing_shards() == [0]
    # The other process looks at the folder when the first has written already: nothing may be left undone.
    fill(cache, READER, encode_images, encode_labels, batch_size=4, process_index=0, num_processes=2)
    assert cache.missing_shards() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolution": 2 * RESOLUTION}, "resolution"),
        ({"num_variants": 1}, "latent_cache_variants"),
        ({"augmentation_seed": 8}, "seed"),
        ({"augmentation_seed": None}, "augmentation, seed, latent_cache_variants"),
        ({"fingerprints": {"VAE": "other"}}, "VAE"),
    ],
)
def test_a_stale_cache_is_refused_and_what_changed_is_named(
    changes: dict[str, object], named: str, make_cache: MakeCache
) -> None:
    fill_up(make_cache())
    with pytest.raises(InputError) as caught:
        make_cache(**changes).claim()
    message = str(caught.value)
    assert message.startswith(f"{make_cache().folder}: a latent cache of other latents; changed since: {named}. ")
    assert "latent_cache_path" in message


def test_a_changed_mask_makes_the_cache_stale(make_cache: MakeCache, pairs: list[Pair]) -> None:
    fill_up(make_cache())
    path = pairs[2].mask_path
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    try:
        with pytest.raises(InputError, match="changed since: pictures and masks"):
            make_cache().claim()
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("content", ["", "[]", '"x"', '{"format": 0}'])
def test_an_index_that_is_no_index_is_stale(content: str, make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.claim()
    (cache.folder / INDEX_FILE_NAME).write_text(content)
    with pytest.raises(InputError, match="changed since: format"):
        make_cache().claim()


def test_a_folder_of_other_files_is_left_alone(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.folder.mkdir()
    (cache.folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files than a latent cache"):
        cache.claim()
    assert [path.name for path in cache.folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_a_truncated_shard_is_named(keep: int, make_cache: MakeCache) -> None:
    cache = make_cache()
    fill_up(cache)
    path = cache.shard_path(1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        cache.missing_shards()
    assert str(caught.value).startswith(f"{path}: a damaged shard of the latent cache")
    path.unlink()
    fill_up(cache)
    assert cache.missing_shards() == []


def test_a_shard_of_another_cache_is_named(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill_up(cache)
    cache.shard_path(1).write_bytes(cache.shard_path(0).read_bytes())
    with pytest.raises(InputError, match="not a shard of this latent cache; remove it"):
        cache.missing_shards()


def test_a_disk_that_is_too_small_is_told_before_the_cache_is_written(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    cache = make_cache()
    with pytest.raises(InputError, match=r"the latent cache needs .* GB more, 0.0 GB are free; free some"):
        fill_up(cache)
    assert cache.missing_shards() == [0, 1]


def test_two_runs_may_fill_one_cache_at_a_time(make_cache: MakeCache) -> None:
    first, second = make_cache(), make_cache()
    first.claim()
    second.claim()
    filled = []

    def meanwhile(images: torch.Tensor) -> torch.Tensor:
        if not filled:
            filled.append(True)
            fill(second, READER, encode_images, encode_labels, batch_size=2)
        return encode_images(images)

    fill(first, READER, meanwhile, encode_labels, batch_size=2)
    assert first.missing_shards() == []
    assert sorted(path.suffix for path in first.folder.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_a_shard_whose_other_writer_was_faster_is_left_as_it_is(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    fill_up(cache)
    tensors = (torch.zeros(4, 6, 3, 32, 32), torch.zeros(4, 2, 1, 32, 32), torch.zeros(4, 2, 32, 32, dtype=torch.uint8))
    before, save_file = cache.shard_path(0).read_bytes(), latent_cache.save_file

    def tidied_up(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        path.unlink()

    monkeypatch.setattr(latent_cache, "save_file", tidied_up)
    cache.write_shard(0, *tensors)
    assert cache.shard_path(0).read_bytes() == before
    cache.shard_path(0).unlink()
    with pytest.raises(InputError, match="cannot be written"):
        cache.write_shard(0, *tensors)


def test_what_a_kill_left_half_written_does_not_make_the_folder_another_ones(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.folder.mkdir()
    (cache.folder / "cache-1234.part").write_bytes(b"half")
    fill_up(cache)
    assert not list(cache.folder.glob("*.part"))


def test_a_disk_that_fills_up_while_caching_leaves_what_is_whole(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    save_file, calls = latent_cache.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(latent_cache, "save_file", full)
    with pytest.raises(InputError, match=r"latents-00001-of-00002.safetensors: cannot be written \(the disk is full\)"):
        fill_up(cache)
    assert cache.missing_shards() == [1]
    assert not list(cache.folder.glob("*.part"))


def test_the_index_tells_what_the_latents_depend_on(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.claim()
    found = json.loads((cache.folder / INDEX_FILE_NAME).read_text())
    assert found["resolution"] == RESOLUTION
    assert found["VAE"] == "abc"
    assert len(found["pictures and masks"]) == 16


def test_training_from_the_cache_equals_training_from_pictures_where_nothing_is_drawn(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"augmentation": "false", "save_checkpoint_steps": 6}
    launch("trainer.py", flags)
    cached = {
        **flags,
        "output_dir": tmp_path / "cached",
        "latent_cache": "disk",
        "latent_cache_path": tmp_path / "cache",
    }
    launch("trainer.py", cached)
    first, second = (read_history(Path(str(run["output_dir"])) / "history.csv") for run in (flags, cached))
    losses = [[float(row["loss"]) for row in rows if row["loss"]] for rows in (first, second)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)  # latents are kept in fp16
    # A second run reads the same cache; another resolution is refused in one line.
    launch("trainer.py", {**cached, "output_dir": tmp_path / "again"})
    refused = launch("trainer.py", {**cached, "output_dir": tmp_path / "other", "resolution": 48}, check=2)
    assert "a latent cache of other latents; changed since: resolution" in refused.stderr
