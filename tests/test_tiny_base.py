"""Building the tiny base: a few updates of both stages, interrupted and resumed, loaded by the ordinary code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import tiny_base
from models.base import load_prompt, load_scheduler, load_transformer, load_vae
from models.mask_decoder import load_mask_decoder
from tests.conftest import ROOT, write_trans10k

BASE = ROOT / "assets" / "tiny_sd3"


def build(out: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    arguments = [
        "tiny_base",
        str(out),
        "--data",
        str(data),
        "--resolution",
        "32",
        "--batch_size",
        "8",
        "--data_type",
        "fp32",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, *more])
    monkeypatch.setattr(tiny_base, "NUM_VARIANTS", 1)
    tiny_base.main()


def test_a_base_is_built_and_the_ordinary_code_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_trans10k(tmp_path / "data", train=4, validation=1, test=1)
    out = tmp_path / "base"
    build(out, data, monkeypatch, "--vae_steps", "2", "--mask_decoder_steps", "2", "--transformer_steps", "2")
    decoder = load_mask_decoder(out / "mask_decoder", load_vae(out, torch.float32))
    assert not decoder.takes_features
    vae, transformer = load_vae(out, torch.float32), load_transformer(out)
    assert load_scheduler(out).config.shift == 3.0
    assert transformer.config.in_channels == vae.config.latent_channels == 16
    assert load_prompt(str(out)).prompt_embeds.shape[-1] == transformer.config.joint_attention_dim
    build(out, data, monkeypatch, "--check")


def test_fitting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def fitted(steps: list[int], folder: Path) -> dict[str, torch.Tensor]:
        average: dict[str, torch.Tensor] = {}
        for stop in steps:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)

            def loss_at(step: int, model: torch.nn.Module = model, stop: int = stop) -> torch.Tensor:
                if step >= stop:
                    raise KeyboardInterrupt
                return model(torch.full((1, 3), float(step + 1))).square().mean()

            try:
                average = tiny_base.fit(model, loss_at, 6, 1e-2, folder, torch.float32)
            except KeyboardInterrupt:
                continue
        return average

    tiny_base_save_seconds = tiny_base.SAVE_SECONDS
    tiny_base.SAVE_SECONDS = -1.0
    try:
        whole, parts = fitted([6], tmp_path / "whole"), fitted([3, 6], tmp_path / "parts")
    finally:
        tiny_base.SAVE_SECONDS = tiny_base_save_seconds
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.skipif(not (BASE / "vae").is_dir(), reason="the tiny base is not there")
def test_the_shipped_base_keeps_masks_and_is_small() -> None:
    _, labels = tiny_base.read_pairs([ROOT / "assets" / "glass_sample"], "test", 128)
    assert tiny_base.mask_round_trip_iou(load_vae(BASE, torch.float32), labels[::8]) >= 0.98
    assert sum(path.stat().st_size for path in BASE.rglob("*.safetensors")) <= 25e6
    transformer = load_transformer(BASE)
    assert transformer.config.qk_norm == "rms_norm"
    assert transformer.config.dual_attention_layers


@pytest.mark.skipif(not (ROOT / "assets" / "glass_sample" / "train").is_dir(), reason="the sample is not there")
def test_the_shipped_sample_is_whole() -> None:
    from dataset.trans10k import scan

    sample = ROOT / "assets" / "glass_sample"
    counts = {split: len(scan("trans10k", sample, split).pairs) for split in ("train", "validation", "test")}
    assert counts == {"train": 800, "validation": 80, "test": 160}
    assert sum(path.stat().st_size for path in sample.rglob("*.*")) <= 12e6
    with Image.open(sample / "train" / "images" / "easy_00000.jpg") as image:
        assert image.size == (128, 128)
