"""Attention on the CPU: in bf16 and for few tokens plain matrix products are several times faster than torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.overrides import TorchFunctionMode

MAX_TOKENS = 1100  # beyond, the matrix of weights costs more memory than it saves time


def use_plain_attention(transformer: SD3Transformer2DModel) -> None:
    """Lets a transformer compute its attention by `attend`; changed in place, not saved with it."""
    transformer.set_attn_processor(PlainJointAttention())


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, equation 1), with the products in bf16 and float32 within the softmax.

    Args:
        query: (B, heads, N, d), any float dtype.
        key: (B, heads, N, d).
        value: (B, heads, N, d), bfloat16.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return weights.softmax(dim=-1).to(value.dtype) @ value


class PlainJointAttention(JointAttnProcessor2_0):
    """Diffusers' processor of SD3's attention, with `attend` in the fused kernel's place where it is faster."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the processor of Diffusers does."""
        with _Replacement():
            return super().__call__(*args, **kwargs)


class _Replacement(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            if value.device.type == "cpu" and value.dtype == torch.bfloat16 and query.shape[-2] <= MAX_TOKENS:
                return attend(query, key, value)
        return func(*args, **(kwargs or {}))
