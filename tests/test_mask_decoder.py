"""The light mask decoder: its size, its training alone, and its way through training, checkpoints, inference and export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.subjects import SD35_VAE
from dataset.codecs import build_codec
from dataset.trans10k import LAYOUTS, PairDataset, scan
from models.base import load_vae
from models.latents import LatentCodec, feature_channels
from models.mask_decoder import LightMaskDecoder, load_mask_decoder, main, train
from models.pipeline import TransparencySegmentationPipeline
from models.trainable import build_trainable, check_settings
from tests.conftest import RESOLUTION, ROOT, Launch, arguments_of, environment, make_prompt, make_vae, write_base
from utils.checkpoints import load_pipeline
from utils.config import Config
from utils.errors import InputError
from utils.history import read_history
from utils.publishing import export

READER = LAYOUTS["trans10k"].read_label
LIGHT = {"mask_decoder": "light", "pixel_loss_weight": 1.0, "latent_loss_weight": 0.2}


@pytest.mark.parametrize("lateral", [False, True])
def test_it_is_small_and_costs_less_than_a_fiftieth_of_the_vaes_decoder(lateral: bool) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD35_VAE)
        decoder = LightMaskDecoder(lateral_channels=feature_channels(vae) if lateral else ())
        latents = torch.zeros(1, 16, 32, 32)  # both grow alike with the pixels, but for the VAE's attention
        features = [torch.zeros(1, c, 256 >> k, 256 >> k) for k, c in enumerate(decoder.config.lateral_channels)]
    assert decoder.num_parameters() < 3e6
    with FlopCounterMode(display=False) as light:
        assert decoder(latents, decoder.project(features)).shape == (1, 256, 256)
    with FlopCounterMode(display=False) as whole:
        vae.decoder(latents)
    assert light.get_total_flops() * 50 < whole.get_total_flops()


def test_a_picture_is_read_alike_alone_and_in_a_batch() -> None:
    decoder = LightMaskDecoder(16, 8).eval()
    latents = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    together = decoder(latents)
    assert together.shape == (3, 32, 48)
    torch.testing.assert_close(decoder(latents[1:2]), together[1:2], rtol=1e-5, atol=1e-6)
    assert decoder.half()(latents.half()).dtype == torch.float32


def test_lateral_input_counts_and_must_be_there() -> None:
    decoder = LightMaskDecoder(16, 8, lateral_channels=(8, 8, 8)).eval()
    latents = torch.zeros(2, 16, 4, 4)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 8, 32 >> k, 32 >> k, generator=generator) for k in range(3)]
    logits = decoder(latents, decoder.project(features))
    for level in range(3):  # each level reaches the mask
        changed = [each * 0 if k == level else each for k, each in enumerate(features)]
        assert not decoder(latents, decoder.project(changed)).allclose(logits)
    with pytest.raises(ValueError, match="0 lateral inputs for a decoder that takes 3"):
        decoder(latents)
    with pytest.raises(ValueError, match="3 lateral inputs for a decoder that takes 0"):
        LightMaskDecoder(16, 8)(latents, decoder.project(features))


@pytest.mark.parametrize("lateral", [False, True])
def test_alone_it_learns_to_read_masks_from_their_latents(lateral: bool) -> None:
    vae = load_vae(ROOT / "assets" / "tiny_sd3", torch.float32)
    pairs = scan("trans10k", ROOT / "assets" / "glass_sample", "train").pairs[:32]
    data = PairDataset(pairs, READER, 64, augmentation_seed=0)
    settings = {"width": 32, "steps": 120, "batch_size": 8, "peak_rate": 3e-3, "seed": 0}
    decoder = train(vae, data, "binary", lateral=lateral, **settings)
    wrong = [share_of_wrong_pixels(vae, decoder, data[0, index]) for index in range(32)]
    assert sum(wrong) / 32 < 0.03  # a decoder that answers "nothing" is wrong on about a third


@torch.no_grad()
def share_of_wrong_pixels(vae: AutoencoderKL, decoder: LightMaskDecoder, sample: dict[str, Any]) -> float:
    """Of a true mask that goes through its latents."""
    codec, label = LatentCodec(vae), sample["label"][None]
    latents = codec.encode(build_codec("binary").encode(label))
    features = codec.encode_with_features(sample["image"][None] * 2 - 1)[1] if decoder.takes_features else []
    return ((decoder(latents, decoder.project(features)) > 0) != (label == 1)).float().mean().item()


def test_the_tiny_base_brings_one_that_reads_unseen_masks() -> None:
    base = ROOT / "assets" / "tiny_sd3"
    vae = load_vae(base, torch.float32)
    decoder = load_mask_decoder(base / "mask_decoder", vae)
    data = PairDataset(scan("trans10k", ROOT / "assets" / "glass_sample", "test", limit=24).pairs, READER, 128)
    wrong = [share_of_wrong_pixels(vae, decoder, data[0, index]) for index in range(24)]
    assert sum(wrong) / 24 < 0.005


@pytest.mark.parametrize(
    ("part", "way"),
    [
        pytest.param("mask_decoder", {"latent_cache": "disk", "cutmix": 0.5, "ema_decay": 0.9}, marks=pytest.mark.slow),
        ("lateral", {"objective": "diffusion", "cutmix": 0.5, "tta": "flip"}),
    ],
)
def test_it_is_trained_saved_resumed_scored_and_exported(
    part: str, way: dict[str, object], base: Path, flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {**LIGHT, **way, "val_steps": 3, "mask_decoder_path": base / part}
    launch("trainer.py", flags)
    whole, parts = tmp_path / "run", tmp_path / "parts"
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", parts / "checkpoints" / "checkpoint-3")
    launch("trainer.py", {**flags, "output_dir": parts, "resume_from_checkpoint": "latest"})
    weights = "checkpoints/checkpoint-6/mask_decoder/diffusion_pytorch_model.safetensors"
    left, right = load_file(whole / weights), load_file(parts / weights)
    start = load_file(base / part / "diffusion_pytorch_model.safetensors")
    assert left.keys() == right.keys() == start.keys()
    assert all(left[name].equal(right[name]) for name in left)
    assert all(not left[name].equal(start[name]) for name in left)  # all of it is trained
    transformer = load_file(whole / "checkpoints/checkpoint-6/transformer/diffusion_pytorch_model.safetensors")
    assert not any("mask_decoder" in name for name in transformer)
    for row in read_history(whole / "history.csv"):
        if row["loss"]:
            parts_of_loss = 0.2 * float(row["latent_loss"]) + float(row["pixel_loss"])
            assert float(row["loss"]) == pytest.approx(parts_of_loss, rel=1e-4)

    done = launch("val_inference.py", {**flags, "load_checkpoint": "best"})
    assert "mix" in done.stdout
    done = launch("val_inference.py", {**flags, "load_checkpoint": "best", "mask_decoder": "vae"}, check=2)
    assert "--mask_decoder vae: the checkpoint was trained with light" in done.stderr
    checkpoint = export(whole, tmp_path / "exported", name="checkpoint-6")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_pipeline(checkpoint, torch.float32).predict(images)
    found = TransparencySegmentationPipeline.from_pretrained(tmp_path / "exported").predict(images)
    torch.testing.assert_close(found.predictions, expected.predictions, rtol=0, atol=0)
    grey = found.predictions
    torch.testing.assert_close(grey[:, :1].expand(-1, 3, -1, -1), grey)  # a probability, not a colour


def test_the_loss_on_pixels_reaches_the_transformer_through_the_vae_too(
    flags: dict[str, object], launch: Launch, tmp_path: Path
) -> None:
    flags |= {"max_train_steps": 2, "val_steps": "null"}
    launch("trainer.py", {**flags, "pixel_loss_weight": 1.0, "latent_loss_weight": 0.0})
    rows = read_history(tmp_path / "run" / "history.csv")
    assert all(float(row["grad_norm"]) > 0 and row["loss"] == row["pixel_loss"] for row in rows)
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "mask_decoder").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_decoder": "light"}, "mask_decoder: light is trained by the loss on pixels; set pixel_loss_weight"),
        ({"cutmix": 0.5, "train_batch_size": 1}, "cutmix takes parts of other samples of the batch"),
        ({"edge_weight": 1.0}, "edge_weight is a part of the loss on pixels"),
        ({"latent_loss_weight": 0.0}, "latent_loss_weight and pixel_loss_weight are both 0"),
        ({"mask_decoder_path": "/nowhere/decoder"}, "mask_decoder_path is given, but mask_decoder is vae"),
    ],
)
def test_settings_at_odds_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(replace(Config(), **changes))


def test_a_latent_cache_without_the_features_is_refused(flags: dict[str, object], base: Path, launch: Launch) -> None:
    done = launch(
        "trainer.py", {**flags, **LIGHT, "mask_decoder_path": base / "lateral", "latent_cache": "disk"}, check=2
    )
    assert "latent_cache: disk keeps no features of the pictures" in done.stderr


def test_a_decoder_that_is_not_there_is_named(base: Path) -> None:
    config = replace(Config(), resolution=32, mask_decoder_path="/nowhere/decoder", **LIGHT)
    with pytest.raises(InputError, match="/nowhere/decoder: cannot be loaded as LightMaskDecoder"):
        build_trainable(config, base, None, make_prompt(), make_vae())


def test_a_base_without_one_says_how_to_train_it(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    shutil.rmtree(folder / "mask_decoder")
    config = replace(Config(), resolution=32, **LIGHT)
    with pytest.raises(InputError, match=r"has no light one; train one with `python -m models\.mask_decoder OUT"):
        build_trainable(config, folder, None, make_prompt(), make_vae())


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (LightMaskDecoder(4, 8), "a mask decoder for 4 latent channels, this base has 16"),
        (
            LightMaskDecoder(16, 8, lateral_channels=(16, 32, 64)),
            r"a mask decoder for VAE features of \[16, 32, 64\] channels, this base has \[8, 8, 8\]",
        ),
    ],
)
def test_a_decoder_for_another_base_is_refused(
    decoder: LightMaskDecoder, message: str, base: Path, tmp_path: Path
) -> None:
    decoder.save_pretrained(tmp_path / "decoder")
    config = replace(Config(), resolution=32, mask_decoder_path=str(tmp_path / "decoder"), **LIGHT)
    with pytest.raises(InputError, match=message):
        build_trainable(config, base, None, make_prompt(), make_vae())


def run_module(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models.mask_decoder", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)


def test_its_command_line_writes_what_a_run_starts_from(
    base: Path,
    trans10k: Path,
    flags: dict[str, object],
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "decoder"
    given = {"base_model_path": base, "dataset_path": trans10k, "resolution": RESOLUTION}
    options = [*arguments_of(given), "--width", 8, "--steps", 3, "--batch_size", 2]
    done = run_module(out, *options)
    assert f"{out}: 0.0" in done.stdout, done.stderr
    assert json.loads((out / "config.json").read_text())["width"] == 8
    launch("trainer.py", {**flags, **LIGHT, "mask_decoder_path": out, "max_train_steps": 2, "val_steps": "null"})
    refused = run_module(out, *options)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    assert "exists already; choose another folder" in refused.stderr
    for changes, message in (
        (["--width", "9"], "--width must be a multiple of 8"),
        (["--resolution", "9"], "--resolution"),
    ):
        monkeypatch.setattr(sys, "argv", ["mask_decoder", *map(str, (tmp_path / "other", *options, *changes))])
        with pytest.raises(InputError, match=message):
            main()
