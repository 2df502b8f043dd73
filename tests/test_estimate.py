"""The memory estimate: the README's figures, counted passes against real ones, launches read from the environment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.subjects import SD35_TRANSFORMER, SD35_VAE
from dataset.latent_cache import bytes_per_pair
from models.objectives import call_transformer
from models.prompt import EmptyPrompt
from tests.conftest import make_transformer, make_vae
from utils.config import Config
from utils.errors import InputError
from utils.estimate import (
    Launch,
    PeakCounter,
    empty_transformer,
    launch_of_environment,
    memory_parts,
    pass_bytes,
    state_bytes,
    vae_bytes,
)

SMALL = {"fold_conditioning": True, "weights": "bf16", "optimizer": "adamw_8bit", "adam_epsilon": 1e-6}
# GB per card for weights, gradients, AdamW and the table of positions, as README's "Which launch for which machine" says
README = [
    (SMALL, Launch(), 9.8),
    ({"fold_conditioning": True}, Launch(), 24.3),
    ({}, Launch(), 36.8),
    ({}, Launch(4, "DDP"), 36.8),
    ({}, Launch(4, "ZeRO", 2), 13.2),
    ({}, Launch(4, "FSDP2"), 9.9),
    ({}, Launch(4, "ZeRO", 3, offload=True), 3.1),
]


def tiny(**changes: Any) -> Config:
    settings = {"resolution": 32, "train_batch_size": 2, "data_type": "fp32", "gradient_checkpointing": False}
    return replace(Config(), **{**settings, "gradient_accumulation_steps": 1, **changes})


@pytest.mark.parametrize(("changes", "launch", "gigabytes"), README)
def test_the_readmes_figures_are_what_is_counted(changes: dict[str, Any], launch: Launch, gigabytes: float) -> None:
    config = replace(Config(), **changes)
    parts = state_bytes(empty_transformer(SD35_TRANSFORMER, config, 154), config, launch)
    assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes, abs=0.08)


def test_the_readmes_figure_for_adapters_is_what_is_counted() -> None:
    pytest.importorskip("peft")
    config = replace(Config(), trainable="lora", weights="bf16")
    parts = state_bytes(empty_transformer(SD35_TRANSFORMER, config, 154), config, Launch())
    assert sum(parts.values()) / 1e9 == pytest.approx(5.7, abs=0.08)


def test_the_parts_of_the_published_recipe() -> None:
    config = replace(Config(), ema_decay=0.999)
    parts = {
        name: value / 1e9
        for name, value in state_bytes(empty_transformer(SD35_TRANSFORMER, config, 154), config, Launch()).items()
    }
    expected = {
        "weights": 8.97,
        "gradients": 8.97,
        "optimiser": 17.95,
        "table of positions": 0.91,
        "moving average": 8.97,
    }
    assert parts == pytest.approx(expected, abs=0.01)


def test_the_readmes_figure_for_the_vae_is_what_is_counted() -> None:
    config = replace(Config(), train_batch_size=4)
    assert vae_bytes(SD35_VAE, config, with_features=False) / 1e9 == pytest.approx(1.5, abs=0.05)
    features = vae_bytes(SD35_VAE, config, with_features=True) - vae_bytes(SD35_VAE, config, with_features=False)
    assert features / 1e9 == pytest.approx(2 * 4 * 0.47, abs=0.01)


def test_the_readmes_figure_for_the_latent_cache_is_what_is_counted() -> None:
    latents = 16 * 128 * 128 * 2
    assert 5000 * bytes_per_pair(8, 2, 1024, latents) / 1e9 == pytest.approx(28, abs=0.6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_pass_without_data_counts_what_a_real_one_holds(checkpointing: bool, accumulation: int) -> None:
    config = tiny(gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation)
    settings = dict(make_transformer().config)
    counted = pass_bytes(empty_transformer(settings, config, 3), config, Launch(), 3, "cuda", {})
    model = make_transformer().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    prompt = EmptyPrompt(3, 32, 16)
    latents, target = torch.zeros(2, 16, 4, 4), torch.zeros(2, 16, 4, 4)
    for parameter in model.parameters() if accumulation > 1 else ():
        parameter.grad = torch.zeros_like(parameter)
    counter = PeakCounter()
    lasting = [*model.parameters(), *model.buffers(), *prompt.parameters(), latents, target]
    for tensor in (*lasting, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)):
        counter._known[tensor.untyped_storage()] = True
    with counter:
        loss = (call_transformer(model, latents, torch.full((2,), 1000.0), prompt) - target).square().mean()
        loss.backward()
    gradients = 0 if accumulation > 1 else sum(parameter.numel() * 4 for parameter in model.parameters())
    assert counted == pytest.approx(max(0, counter.peak - gradients), rel=0.1, abs=4096)


def test_autocast_copies_fp32_weights_and_not_half_ones() -> None:
    parameters = sum(parameter.numel() for parameter in make_transformer().parameters())
    settings = dict(make_transformer(caption_projection_dim=64, attention_head_dim=32).config)
    counts = {}
    for weights in ("fp32", "bf16"):
        config = tiny(
            data_type="bf16",
            weights=weights,
            train_batch_size=1,
            gradient_checkpointing=True,
            gradient_accumulation_steps=2,
        )
        counts[weights] = pass_bytes(empty_transformer(settings, config, 3), config, Launch(), 3, "cuda", {})
    linear = sum(p.numel() for p in empty_transformer(settings, tiny(), 3).parameters())
    assert parameters < linear
    assert counts["fp32"] - counts["bf16"] > 0.8 * 2 * linear


def test_a_loss_on_pixels_and_a_mask_decoder_are_counted() -> None:
    transformer, vae = dict(make_transformer().config), dict(make_vae().config)
    plain = memory_parts(transformer, vae, tiny(), Launch(), 3)
    through_vae = memory_parts(transformer, vae, tiny(pixel_loss_weight=1.0), Launch(), 3)
    decoder = {"latent_channels": 16, "width": 8}
    light = memory_parts(
        transformer,
        vae,
        tiny(pixel_loss_weight=1.0, mask_decoder="light", latent_cache="disk"),
        Launch(),
        3,
        decoder_settings=decoder,
    )
    assert through_vae["passes"] > light["passes"] > plain["passes"]
    assert light["weights"] > plain["weights"]
    assert light["VAE"] == 0 < plain["VAE"] == through_vae["VAE"]


def test_larger_batches_and_more_accumulation_take_more() -> None:
    transformer = dict(make_transformer().config)
    passes = [
        pass_bytes(empty_transformer(transformer, config, 3), config, Launch(), 3, "cuda", {})
        for config in (tiny(), tiny(train_batch_size=8), tiny(train_batch_size=8, gradient_accumulation_steps=2))
    ]
    assert passes == sorted(passes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"resolution": 256}, "does not fit this base"), ({"objective": "end_to_end"}, "input channels")],
)
def test_a_base_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = (
        dict(make_transformer(in_channels=32).config) if "objective" in changes else dict(make_transformer().config)
    )
    with pytest.raises(InputError, match=message):
        empty_transformer(settings, tiny(**changes), 3)


def test_launches_are_read_from_the_environment(tmp_path: Path) -> None:
    assert launch_of_environment({}) == Launch()
    assert launch_of_environment({"WORLD_SIZE": "4"}) == Launch(4, "DDP")
    assert launch_of_environment({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}) == Launch(4, "FSDP2")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    deepspeed = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert launch_of_environment(deepspeed) == Launch(2, "ZeRO", 3, offload=True)
    assert str(launch_of_environment(deepspeed)) == "ZeRO-3, optimiser in host memory, 2 processes"
    assert str(Launch()) == "one process"
    assert str(Launch(4, "FSDP2")) == "FSDP2, 4 processes"
