"""Folding keeps the output, drops a third of the weights, and trains its vectors as fast as what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from benchmarks.subjects import SD35_TRANSFORMER
from models.base import load_transformer
from models.folding import FoldedSD3Transformer2DModel, fold, is_folded, modulated_norms, parameter_groups, rate_scales
from models.objectives import EndToEnd
from models.prompt import EmptyPrompt
from tests.conftest import make_prompt, make_transformer

OBJECTIVE = EndToEnd({}, 3.0)


def folded_transformer(timestep: float = 1000.0) -> FoldedSD3Transformer2DModel:
    return fold(make_transformer(), make_prompt(), timestep)


def latents(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 16, 4, 4, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predict(transformer: SD3Transformer2DModel, batch_size: int = 2) -> torch.Tensor:
    return OBJECTIVE.predict(transformer, latents(batch_size), make_prompt())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_output_stays_the_same(batch_size: int) -> None:
    torch.testing.assert_close(
        predict(folded_transformer(), batch_size), predict(make_transformer(), batch_size), rtol=1e-5, atol=1e-5
    )


def test_another_timestep_or_prompt_gives_another_output() -> None:
    expected = predict(make_transformer())
    assert (predict(folded_transformer(500.0)) - expected).abs().max() > 1e-3
    generator = torch.Generator().manual_seed(9)
    other = EmptyPrompt.from_tensors(
        torch.randn(1, 3, 32, generator=generator), torch.randn(1, 16, generator=generator)
    )
    assert (predict(fold(make_transformer(), other, 1000.0)) - expected).abs().max() > 1e-3


def test_a_third_of_sd35_mediums_parameters_go() -> None:
    prompt_rows = 154
    with torch.device("meta"):
        whole = SD3Transformer2DModel(**SD35_TRANSFORMER)
        folded = FoldedSD3Transformer2DModel(**SD35_TRANSFORMER, num_prompt_rows=prompt_rows)

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    constants = sum(norm.linear.vector.numel() for norm in modulated_norms(folded)) + prompt_rows * 1536
    assert round(count(whole) / 1e6) == 2243
    assert round((count(whole) - count(folded) + constants) / 1e6) == 782


def test_a_saved_folded_transformer_says_so_and_loads_as_one(tmp_path: Path) -> None:
    transformer = folded_transformer()
    transformer.save_pretrained(tmp_path / "transformer")
    loaded = load_transformer(tmp_path)
    assert is_folded(loaded)
    torch.testing.assert_close(predict(loaded), predict(transformer), rtol=0, atol=0)
    assert rate_scales(loaded) == rate_scales(transformer)


def test_the_answer_has_the_precision_that_the_layer_would_have_answered_in() -> None:
    whole, folded = make_transformer(), folded_transformer()
    seen: dict[str, list[torch.dtype]] = {"whole": [], "folded": []}
    for name, model in (("whole", whole), ("folded", folded)):
        for norm in modulated_norms(model):
            norm.linear.register_forward_hook(lambda _m, _x, y, name=name: seen[name].append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            predict(model)
    assert seen["whole"] == seen["folded"] == [torch.bfloat16] * len(list(modulated_norms(whole)))


def test_an_update_moves_a_vector_as_far_as_the_layer_it_stands_for() -> None:
    """One step of Adam moves each weight by the rate, so y = Wx + b moves by the rate times |x|_1 + 1 (all of one sign)."""
    rate = 1e-4
    whole, folded = make_transformer(), folded_transformer()
    before = [norm.linear.vector.detach().clone() for norm in modulated_norms(folded)]
    outputs: list[list[torch.Tensor]] = []
    for model in (whole, folded):
        groups = (
            parameter_groups(model, rate) if model is folded else [{"params": list(model.parameters()), "lr": rate}]
        )
        optimizer = torch.optim.AdamW(groups, eps=1e-15, weight_decay=0.0)
        if model is whole:  # only the linear layers themselves, not what computes their input
            model.time_text_embed.requires_grad_(False)
        OBJECTIVE.loss(model, latents(), latents() * 0, make_prompt()).latent_loss.mean().backward()
        optimizer.step()
        with torch.no_grad():
            embedding = whole.time_text_embed(torch.full((1,), 1000.0), make_prompt().pooled_prompt_embeds)
            x = torch.nn.functional.silu(embedding)
        outputs.append([norm.linear(x).detach() for norm in modulated_norms(model)])
    for start, slow, fast in zip(before, *outputs, strict=True):
        moved = (slow - start).abs() > rate  # a gradient that is zero moves neither
        assert moved.any()
        torch.testing.assert_close((fast - start)[moved], (slow - start)[moved], rtol=0.02, atol=0)


def test_groups_hold_each_trainable_parameter_once() -> None:
    transformer = folded_transformer()
    transformer.proj_out.requires_grad_(False)
    groups = parameter_groups(transformer, 2.0)
    held = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trainable}
    assert len(held) == len(trainable)
    assert all(group["lr"] == 2.0 * group["rate_scale"] for group in groups)
    assert sum(group["rate_scale"] == 1.0 for group in groups) == 1
