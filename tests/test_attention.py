"""Attention by plain products: the fused kernel's answer and gradient, and where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import attention
from models.attention import attend, use_plain_attention
from models.objectives import call_transformer
from tests.conftest import make_prompt, make_transformer


def make_heads(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 10, 8, generator=generator).requires_grad_() for _ in range(count)]


def test_it_answers_like_the_fused_kernel_with_the_same_gradient() -> None:
    query, key, value = make_heads()
    found = attend(query, key, value.to(torch.bfloat16)).float()
    gradients = torch.autograd.grad(found.square().sum(), (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), (query, key, value)), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_equal_keys_give_the_mean_of_the_values() -> None:
    value = torch.tensor([[1.0, 3.0], [2.0, -3.0]], dtype=torch.bfloat16)[None, None]
    found = attend(torch.randn(1, 1, 2, 2), torch.ones(1, 1, 2, 2), value)
    assert found.tolist() == [[[[1.5, 0.0], [1.5, 0.0]]]]


@pytest.mark.parametrize(
    ("dtype", "autocast", "max_tokens", "used"),
    [
        (torch.bfloat16, False, 1100, True),
        (torch.float32, True, 1100, True),  # as the trainer calls it
        (torch.float32, False, 1100, False),
        (torch.bfloat16, False, 3, False),
    ],
)
def test_it_is_used_for_few_tokens_in_bf16_only(
    dtype: torch.dtype, autocast: bool, max_tokens: int, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention, "MAX_TOKENS", max_tokens)
    monkeypatch.setattr(attention, "attend", lambda *heads: calls.append(1) or attend(*heads))
    transformer, plain = make_transformer().to(dtype), make_transformer().to(dtype)
    use_plain_attention(plain)
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps = torch.full((2,), 1000.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = call_transformer(plain, latents, timesteps, make_prompt())
        expected = call_transformer(transformer, latents, timesteps, make_prompt())
    assert bool(calls) == used
    assert len(calls) in (0, 3)  # two layers, one of them with dual attention
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert used or found.equal(expected)


def test_gradient_checkpointing_computes_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        transformer = make_transformer().to(torch.bfloat16).train()
        use_plain_attention(transformer)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
        call_transformer(transformer, latents, torch.full((2,), 1000.0), make_prompt()).square().mean().backward()
        gradients.append(transformer.transformer_blocks[0].attn.to_q.weight.grad)
    assert gradients[0].equal(gradients[1])
