"""What leaving out the prompt's zero rows changes in a transformer's answer.

The published prompt has 154 rows, of which T5's 77 are zero. They are not masked: the context embedder turns each into its bias,
and attention sees them. A prompt without zero rows, such as the tiny base's, is first padded with as many as it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataset.trans10k import LAYOUTS, PairDataset, scan
from models.base import load_prompt, load_transformer, load_vae, resolve_base
from models.latents import LatentCodec
from models.objectives import EndToEnd
from models.prompt import EmptyPrompt
from utils.errors import InputError, run_command
from utils.provenance import machine


def with_zero_rows(prompt: EmptyPrompt) -> EmptyPrompt:
    """Returns a prompt that has zero rows: itself, or as many zero rows behind its own."""
    rows = prompt.prompt_embeds.data
    if (rows == 0).all(dim=-1).any():
        return prompt
    return EmptyPrompt.from_tensors(
        torch.cat([rows, torch.zeros_like(rows)], dim=1), prompt.pooled_prompt_embeds.data.clone()
    )


@torch.no_grad()
def relative_change(transformer: Any, latents: torch.Tensor, prompt: EmptyPrompt) -> float:
    """Returns |without - with| / |with| of what the transformer answers to latents (B, C, h, w) end to end."""
    objective = EndToEnd({}, 3.0)
    whole = objective.predict(transformer, latents, prompt)
    short = objective.predict(transformer, latents, prompt.without_zero_rows())
    return float((short - whole).norm() / whole.norm())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: prints and writes the change on pictures of a test split."""
    parser = argparse.ArgumentParser("python -m benchmarks.prompt_rows", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model_path", default="assets/tiny_sd3", help="folder or hub id [assets/tiny_sd3]")
    parser.add_argument("--data", type=Path, default=Path("assets/glass_sample"), help="in the Trans10k layout")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures [128]")
    parser.add_argument("--pictures", type=int, default=16, help="of the test split [16]")
    parser.add_argument("--out", type=Path, default=Path("runs/prompt_rows.json"), help="file for the results")
    arguments = parser.parse_args(argv)
    if arguments.pictures < 1 or arguments.resolution < 16 or arguments.resolution % 16:
        raise InputError("--pictures must be at least 1, --resolution a multiple of 16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = resolve_base(arguments.base_model_path)
    pairs = scan("trans10k", arguments.data, "test", limit=arguments.pictures).pairs
    data = PairDataset(pairs, LAYOUTS["trans10k"].read_label, arguments.resolution)
    codec = LatentCodec(load_vae(base, torch.float32).to(device))
    images = torch.stack([data[0, index]["image"] for index in range(len(pairs))])
    latents = torch.cat([codec.encode(chunk.to(device) * 2 - 1) for chunk in images.split(1)])
    prompt = with_zero_rows(load_prompt(arguments.base_model_path)).to(device)
    change = relative_change(load_transformer(base).to(device).eval(), latents, prompt)
    record = {
        "command": " ".join(["python -m benchmarks.prompt_rows", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "rows": prompt.prompt_embeds.shape[1],
        "zero_rows": prompt.prompt_embeds.shape[1] - prompt.without_zero_rows().prompt_embeds.shape[1],
        "relative_change": change,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['zero_rows']} of {record['rows']} rows left out change the prediction by {change:.2%} of its norm")


if __name__ == "__main__":
    run_command(main)
