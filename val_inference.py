"""Predicts the test split with a checkpoint, scores it and writes the pictures; every key of config.yaml is also a flag."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from dataset.trans10k import PairDataset, layout_of, scan
from models.attention import use_plain_attention
from models.base import DTYPES, check_resolution
from models.pipeline import TransparencySegmentationPipeline
from models.prompt import EmptyPrompt
from utils import checkpoints
from utils.config import Config, parse_config
from utils.engine import build_accelerator
from utils.errors import InputError, run_command
from utils.evaluation import evaluate
from utils.metrics import summarise
from utils.page import write_page
from utils.protocols import calibration
from utils.report import (
    DETAILS_FILE_NAME,
    BackgroundPngWriter,
    format_protocols,
    format_table,
    place_for,
    replace_folder,
    write_evaluation,
    write_scores,
)
from utils.scoring import Scorer, intervals
from utils.signals import StopRequests


def check_flags(config: Config, flags: frozenset[str], trained: Config, checkpoint: Path) -> None:
    """Compares what was given as flags with what the checkpoint was trained with.

    Raises:
        InputError: if objective, mask decoder, base or prompt contradict.
    """
    remedy = f"leave the flag out, or load another checkpoint than {checkpoint}"
    for name in ("objective", "prediction", "mask_decoder"):
        given, used = getattr(config, name), getattr(trained, name)
        if name in flags and given != used:
            raise InputError(f"--{name} {given}: the checkpoint was trained with {used}; {remedy}")
    if "base_model_path" in flags and not checkpoints.same_base(config, trained):
        raise InputError(
            f"--base_model_path {config.base_model_path}: the checkpoint was trained on {trained.base_model_path}; {remedy}"
        )
    if "prompt_embeds_path" in flags and config.prompt_embeds_path is not None:
        prompt = EmptyPrompt.from_file(Path(config.prompt_embeds_path))
        stored = EmptyPrompt.from_file(checkpoint / checkpoints.PROMPT_FILE_NAME)
        if not torch.equal(prompt.prompt_embeds, stored.prompt_embeds) or not torch.equal(
            prompt.pooled_prompt_embeds, stored.pooled_prompt_embeds
        ):
            raise InputError(
                f"--prompt_embeds_path {config.prompt_embeds_path}: not the checkpoint's own prompt; {remedy}"
            )


def check_classes(config: Config, checkpoint: Path) -> None:
    """Compares what the masks to score by tell with what the checkpoint was trained to tell.

    Raises:
        InputError: if these are other classes.
    """
    found, learnt = layout_of(config.dataset_name, config.palette).palette, checkpoints.read_palette(checkpoint)
    if found != learnt:
        told = [" ".join(palette.names) if palette else "glass or not" for palette in (found, learnt)]
        raise InputError(
            f"dataset_name: {config.dataset_name} with palette: {config.palette} tells {told[0]}, the checkpoint was trained to tell "
            f"{told[1]}{', in other colours' if told[0] == told[1] else ''}; score it on masks of these "
            f"(--palette {checkpoint / checkpoints.PALETTE_FILE_NAME} for a folder)"
        )


def choose_checkpoint(config: Config, flags: frozenset[str]) -> Path:
    """Returns the checkpoint to score: where a file, not a flag, asks for the best and nothing was validated, the latest.

    Raises:
        InputError: if there is no such complete checkpoint.
    """
    name = config.load_checkpoint
    if name == "best" and "load_checkpoint" not in flags:
        name = checkpoints.best_or_latest(config.output_dir)
    return checkpoints.find_checkpoint(config.output_dir, name, "load_checkpoint")


def chosen_on(config: Config, checkpoint: Path) -> str:
    """Returns where the threshold comes from: `configuration`, `validation`, or `default` where nothing was validated."""
    if config.threshold != "validation":
        return "configuration"
    return "default" if checkpoints.read_best(checkpoint.parent.parent) is None else "validation"


def main() -> None:
    """Command line of the inference."""
    config, flags = parse_config(sys.argv[1:], __doc__ or "")
    stop = StopRequests()
    checkpoint = choose_checkpoint(config, flags)
    trained = checkpoints.read_config(checkpoint)
    check_flags(config, flags, trained, checkpoint)
    check_classes(config, checkpoint)
    layout = layout_of(config.dataset_name, config.palette)
    settings = {name: getattr(config, name) for name in ("denoise_steps", "ensemble_size", "tta", "tile_size")}
    settings["threshold"] = checkpoints.chosen_threshold(config, checkpoint)
    scorer = Scorer(config.protocol, config.score_sizes, layout, settings["threshold"])
    found = scan(
        config.dataset_name,
        config.dataset_path,
        "test",
        config.test_difficulty,
        config.mismatched_pairs,
        config.num_vals_test,
    )
    accelerator = build_accelerator(config)
    stop.share()
    accelerator.print(found)
    accelerator.print(f"{checkpoint.name}, threshold {settings['threshold']:.3g}")
    resolution = config.resolution if "resolution" in flags else trained.resolution
    with accelerator.local_main_process_first():
        pipeline: TransparencySegmentationPipeline = checkpoints.load_pipeline(
            checkpoint, DTYPES[config.data_type], config.compile
        )
    check_resolution(min(resolution, config.tile_size or resolution), pipeline.transformer)
    pipeline.to(accelerator.device)
    if accelerator.device.type == "cpu" and not config.compile:
        use_plain_attention(pipeline.transformer)

    step = checkpoints.read_state(checkpoint).global_step
    details: dict[str, Any] = {"checkpoint": str(checkpoint), "objective": trained.objective, "resolution": resolution}
    details |= {"dataset_name": config.dataset_name, "dataset_path": config.dataset_path}
    details |= {"data_type": config.data_type, "seed": config.seed, "pictures": len(found.pairs), **settings}
    final = place_for(Path(config.output_dir) / "mask_predictions" / f"test_{config.test_difficulty}_{step}", details)
    partial = final.with_name(f".partial-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{partial.parent}: cannot be written ({error.strerror}); check output_dir") from error
    accelerator.wait_for_everyone()
    try:
        with BackgroundPngWriter(partial) as write:
            found_scores = evaluate(
                pipeline,
                PairDataset(found.pairs, layout.read_label, resolution),
                accelerator,
                batch_size=config.test_batch_size,
                seed=config.seed,
                num_workers=config.dataloader_num_workers,
                settings=settings,
                write=write,
                scorer=scorer,
                poll_stop=stop.poll,
                description=f"test {config.test_difficulty}",
            )
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        scores = found_scores.scores
        summary = summarise(scores)
        evaluation = {
            "threshold": {"value": settings["threshold"], "chosen_on": chosen_on(config, checkpoint)},
            "intervals": intervals(scores),
            "calibration": calibration(found_scores.histograms.sum(axis=0)),
            "protocols": scorer.summarise(found_scores.records),
        }
        write_scores(partial, summary, scores)
        write_evaluation(partial, evaluation, found_scores.histograms)
        (partial / DETAILS_FILE_NAME).write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
        replace_folder(partial, final)
        print(format_table(summary, config.test_difficulty))
        print(format_protocols(evaluation["protocols"]))
        print(f"pictures and scores: {final}")
        try:
            print(f"to look at: {write_page(final, f'{Path(config.output_dir).name}, {final.name}')}")
        except (InputError, OSError) as error:
            print(f"warning: no page to look at ({error}); write it with: python -m utils.page {final}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
