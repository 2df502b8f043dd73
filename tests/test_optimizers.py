"""Every choice of optimiser trains, keeps its state through a file, and says what it lacks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.folding import fold
from models.trainable import MIN_8BIT_EPSILON
from tests.conftest import make_prompt, make_transformer
from utils.config import Config
from utils.errors import InputError
from utils.optimizers import build_optimizer, set_rate
from utils.tensors import gather_optimizer, load_optimizer, save_optimizer

CONFIG = Config(adam_epsilon=1e-8)
CHOICES = [("adamw", "fp32"), ("adamw", "bf16"), ("adamw_8bit", "fp32"), ("adamw_8bit", "bf16")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(torch.nn.Module):
    """Large enough for its moments to be kept in 8 bit, which starts at 4,096 values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = torch.nn.Linear(64, 128, dtype=dtype)
        self.small = torch.nn.Linear(128, 1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(torch.relu(self.large(x)))


@pytest.fixture(autouse=True)
def _not_compiled() -> object:
    """The library compiles its step, which takes a minute and changes nothing here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def step(model: Model, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 64, generator=generator).to(model.large.weight.dtype)
    loss = (model(x).float() - x[:, :1].float()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def build(optimizer: str, weights: str) -> tuple[Model, torch.optim.Optimizer]:
    if (optimizer, weights) != ("adamw", "fp32"):
        pytest.importorskip("torchao")
    model = Model(DTYPES[weights])
    return model, build_optimizer(model, replace(CONFIG, optimizer=optimizer, weights=weights), 1e-2)


@pytest.mark.parametrize(("optimizer", "weights"), CHOICES)
def test_every_choice_trains_and_its_state_survives_a_file(optimizer: str, weights: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, first = build(optimizer, weights)
    losses = [step(model, first, seed) for seed in range(30)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    save_optimizer(first, model.named_parameters(), tmp_path / "state.safetensors")
    copy, second = build(optimizer, weights)
    copy.load_state_dict(model.state_dict())
    load_optimizer(second, copy.named_parameters(), tmp_path / "state.safetensors")
    torch.testing.assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)
    for trained, stepped in ((model, first), (copy, second)):
        set_rate(stepped, 1e-3)
        torch.manual_seed(2)  # of the stochastic rounding
        step(trained, stepped, 99)
    torch.testing.assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_the_step_count_is_read_to_where_the_optimiser_wants_it(fused: bool, device: str, tmp_path: Path) -> None:
    model, first = build("adamw", "fp32")
    step(model, first, 0)
    save_optimizer(first, model.named_parameters(), tmp_path / "state.safetensors")
    copy = Model(torch.float32).to("meta")  # stands for a GPU, where a fused update reads the count on the device
    second = torch.optim.AdamW(copy.parameters())
    second.param_groups[0]["fused"] = fused
    load_optimizer(second, copy.named_parameters(), tmp_path / "state.safetensors")
    assert second.state[copy.small.bias]["step"].device.type == device


def test_only_the_process_that_saves_keeps_the_state() -> None:
    model, optimizer = build("adamw", "fp32")
    step(model, optimizer, 0)
    assert gather_optimizer(optimizer, model.named_parameters(), keep=False) == {}
    assert len(gather_optimizer(optimizer, model.named_parameters())) == 3 * 4


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_8_bit_moments_take_a_quarter(weights: str) -> None:
    model, optimizer = build("adamw_8bit", weights)
    step(model, optimizer, 0)
    state = optimizer.state[model.large.weight]
    codes, _, _ = (getattr(state["exp_avg"], name) for name in ("codes", "scale", "qmap"))
    assert codes.dtype == torch.uint8
    assert codes.numel() == model.large.weight.numel()


def test_an_8_bit_update_with_the_smallest_epsilon_allowed_is_a_few_rates_at_most() -> None:
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    model = torch.nn.ParameterDict({"weight": weight})
    optimizer = build_optimizer(
        model, replace(CONFIG, optimizer="adamw_8bit", adam_epsilon=MIN_8BIT_EPSILON), learning_rate := 1e-4
    )
    torch.manual_seed(0)
    # Gradients of very different scales, as in a clipped fine-tune of billions of weights.
    scales = 2e-5 * torch.randn(64, 256).mul(1.5).exp()
    largest = 0.0
    for _ in range(30):
        before = weight.detach().clone()
        weight.grad = scales * torch.randn(64, 256)
        optimizer.step()
        largest = max(largest, (weight.detach() - before).abs().max().item())
    assert largest < 10 * learning_rate


def test_updates_that_bf16_cannot_resolve_still_move_the_weights_on_average() -> None:
    pytest.importorskip("torchao")
    model = torch.nn.Linear(100, 100, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, replace(CONFIG, weights="bf16"), 1e-4)
    torch.manual_seed(0)
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    # Just below 1 bf16 resolves 0.0039; twenty steps of 1e-4 in one direction are half of that.
    assert model.weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def test_the_rate_of_folded_vectors_is_a_multiple() -> None:
    transformer = fold(make_transformer(), make_prompt(), 1000.0)
    optimizer = build_optimizer(transformer, CONFIG, 1e-3)
    set_rate(optimizer, 5e-4)
    rates = {group["rate_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {scale: pytest.approx(5e-4 * scale) for scale in rates}
    assert transformer.config.modulation_rate_scale in rates


def test_the_state_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    model, first = build("adamw_8bit", "fp32")
    step(model, first, 0)
    save_optimizer(first, model.named_parameters(), tmp_path / "state.safetensors")
    copy, second = build("adamw", "fp32")
    with pytest.raises(ValueError, match="is not in this optimiser's form"):
        load_optimizer(second, copy.named_parameters(), tmp_path / "state.safetensors")


@pytest.mark.parametrize(("optimizer", "weights"), CHOICES[1:])
def test_a_missing_library_is_named(optimizer: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError) as caught:
        build_optimizer(Model(DTYPES[weights]), replace(CONFIG, optimizer=optimizer, weights=weights), 1e-3)
    assert str(caught.value).startswith(f"optimizer: {optimizer} with weights: {weights} needs torchao")
    assert "requirements-memory.txt" in str(caught.value)
