"""Adapters start as nothing, train alone, travel as peft's files, and merge without changing the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from models.base import widen_patch_projection
from models.lora import CONFIG_FILE_NAME, WEIGHTS_FILE_NAME, add_lora, has_lora, load_lora, merge_lora, save_lora
from models.objectives import EndToEnd
from tests.conftest import make_prompt, make_transformer
from utils.errors import InputError

pytest.importorskip("peft")

TARGETS = "to_q,to_v,net.2"


def adapted(in_channels: int = 16, trained: bool = False) -> SD3Transformer2DModel:
    transformer = widen_patch_projection(make_transformer(), in_channels)
    add_lora(transformer, 4, TARGETS)
    if trained:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


@torch.no_grad()
def predict(transformer: torch.nn.Module, channels: int = 16) -> torch.Tensor:
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    return EndToEnd({}, 3.0).predict(transformer, latents, make_prompt())


def test_fresh_adapters_change_nothing_and_only_they_train() -> None:
    transformer = adapted()
    assert has_lora(transformer)
    assert not has_lora(make_transformer())
    torch.testing.assert_close(predict(transformer), predict(make_transformer()), rtol=1e-5, atol=1e-6)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable}
    assert layers == {"to_q", "to_v", "2"}


def test_a_widened_patch_projection_trains_whole() -> None:
    trainable = {name for name, parameter in adapted(32).named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {"pos_embed.proj.weight", "pos_embed.proj.bias"}


@pytest.mark.parametrize("channels", [16, 32])
def test_saved_adapters_come_back(channels: int, tmp_path: Path) -> None:
    transformer = adapted(channels, trained=True)
    save_lora(transformer, transformer.state_dict(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_FILE_NAME, CONFIG_FILE_NAME}
    assert json.loads((tmp_path / CONFIG_FILE_NAME).read_text())["r"] == 4
    fresh = adapted(channels)
    assert (predict(fresh, channels) - predict(transformer, channels)).abs().max() > 1e-3
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(predict(fresh, channels), predict(transformer, channels), rtol=0, atol=0)


def test_merged_adapters_give_the_same_output_in_a_plain_transformer() -> None:
    transformer = adapted(trained=True)
    expected = predict(transformer)
    merge_lora(transformer)
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    assert transformer.state_dict().keys() == make_transformer().state_dict().keys()


def test_adapters_of_another_rank_are_refused_by_name(tmp_path: Path) -> None:
    transformer = adapted()
    save_lora(transformer, transformer.state_dict(), tmp_path)
    other = make_transformer()
    add_lora(other, 2, TARGETS)
    with pytest.raises(InputError) as caught:
        load_lora(other, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / WEIGHTS_FILE_NAME}: cannot be loaded as adapters of this base")


def test_broken_adapters_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE_NAME).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be loaded as adapters of this base"):
        load_lora(adapted(), tmp_path)


@pytest.mark.parametrize("targets", ["to_q,nowhere", "pos_embed.proj", "", " , "])
def test_targets_that_match_no_linear_layer_are_refused(targets: str) -> None:
    with pytest.raises(InputError, match="lora_targets: no linear layer of this base ends in"):
        add_lora(make_transformer(), 4, targets)
