"""The moving average follows its formula and leaves the raw weights as they were."""

from __future__ import annotations

import pytest
import torch

from utils.ema import MovingAverage


def make_model(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, value)
    model.bias.requires_grad_(False)
    return model


def test_the_average_follows_its_formula() -> None:
    model = make_model(1.0)
    average = MovingAverage(model, 0.5)
    expected = 1.0
    for step, value in enumerate((3.0, -2.0, 5.0, 7.0), start=1):
        torch.nn.init.constant_(model.weight, value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.average["weight"].item() == pytest.approx(expected)
    assert set(average.average) == {"weight"}  # what is not trained is not averaged


def test_the_average_stands_in_and_the_raw_weights_return_even_after_an_error() -> None:
    model = make_model(1.0)
    average = MovingAverage(model, 0.9)
    torch.nn.init.constant_(model.weight, 4.0)
    with average.in_place() as raw:
        assert model.weight.item() == 1.0
        assert raw["weight"].item() == 4.0
    assert model.weight.item() == 4.0
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert model.weight.item() == 4.0


def test_weights_in_bf16_have_an_average_in_fp32() -> None:
    model = make_model(1.0).to(torch.bfloat16)
    average = MovingAverage(model, 0.999)
    torch.nn.init.constant_(model.weight, 1.0078125)
    average.update(10**6)
    # A thousandth of the difference is less than bf16 could tell from 1.
    assert average.average["weight"].item() == pytest.approx(1 + 0.0078125e-3, abs=1e-7)


def test_a_resumed_average_starts_from_what_was_saved() -> None:
    model = make_model(1.0)
    average = MovingAverage(model, 0.9)
    average.load({"weight": torch.tensor([[6.0]])})
    assert average.average["weight"].item() == 6.0
    assert model.weight.item() == 1.0
