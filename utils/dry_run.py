"""`trainer.py --dry_run`: what a training would do, need and take, and all that is wrong, before it starts; nothing is written."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dataset.latent_cache import BYTES_PER_VALUE, bytes_per_pair
from dataset.sampling import BatchStream
from dataset.trans10k import Scan, layout_of, scan
from models.base import PROMPT_FILE_NAME, TEXT_PARTS, check_prompt, prompt_cache_path, resolve_base
from models.latents import DOWNSCALE
from models.prompt import EmptyPrompt
from models.trainable import contradictions, find_mask_decoder
from utils import checkpoints
from utils.config import Config
from utils.engine import check_launcher_settings
from utils.errors import EXIT_BAD_INPUT, InputError, one_line
from utils.estimate import Launch, empty_decoder, empty_transformer, launch_of_environment, memory_parts
from utils.outline import Outline, outline_of, read_settings
from utils.plan import TrainingPlan
from utils.rehearsal import measure
from utils.trackers import check_tracker
from utils.training_state import bytes_per_parameter, find_resumed

PROMPT_ROWS = 154  # of SD3.5's empty prompt
LATENT_CHANNELS = 16
MAX_PARAMETERS_ON_CPU = 200_000_000

Found = TypeVar("Found")


@dataclass
class DryRun:
    """Collects what is wrong instead of ending at the first.

    Args:
        config: of the run.
        launch: of this process.
    """

    config: Config
    launch: Launch
    is_main: bool = True
    problems: list[str] = field(default_factory=list)
    updates_done: int = 0

    def attempt(self, look: Callable[[], Found]) -> Found | None:
        """Returns what `look` does, or notes its error and returns None."""
        try:
            return look()
        except InputError as error:
            self.note(one_line(error))
            return None

    def note(self, problem: str) -> None:
        """Notes a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def say(self, name: str, text: object) -> None:
        """Prints a line on the main process."""
        if self.is_main:
            print(f"{name:<14}{text}", flush=True)


def dry_run(config: Config, make_trainer: Callable[..., Any]) -> int:
    """Prints the report of a dry run; called by all processes of a launch, of which the first prints.

    Args:
        config: of the run.
        make_trainer: `trainer.Trainer`, for the updates that are measured.

    Returns:
        The exit code, 2 if something is wrong; the processes that do not print leave with 0, lest a launcher ends the one that does.
    """
    run = DryRun(config, launch_of_environment(), is_main=os.environ.get("RANK", "0") == "0")
    _check_keys_and_packages(run)
    train = _report_data(run)
    plan = _report_plan(run, train)
    base = _find_base(run)
    fits = _report_model(run, base, plan)
    _report_disk(run, train)
    _report_time(run, train, plan, base, fits, make_trainer)
    for problem in run.problems or ["nothing"]:
        run.say("wrong", problem)
    return EXIT_BAD_INPUT if run.problems and run.is_main else 0


def _check_keys_and_packages(run: DryRun) -> None:
    config = run.config
    for message in run.attempt(lambda: list(contradictions(config))) or []:
        run.note(message)
    run.attempt(lambda: check_tracker(config.tracker))
    run.attempt(lambda: check_launcher_settings(config))
    needed = {"torchao": (config.optimizer, config.weights) != ("adamw", "fp32"), "peft": config.trainable == "lora"}
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            run.note(f"{package} is not installed; pip install -r requirements-memory.txt")
    if config.data_type == "fp16" and not torch.cuda.is_available():
        run.note("data_type: fp16 needs a GPU; use bf16 or fp32 on this machine")


def _report_data(run: DryRun) -> Scan | None:
    """Prints what was found of the data set, and returns the training split."""
    config = run.config
    data = (config.dataset_name, config.dataset_path)
    train = run.attempt(lambda: scan(*data, "train", mismatched_pairs=config.mismatched_pairs))
    found: list[Scan | None] = [train]
    if config.val_steps is not None:
        limit = config.num_vals_train
        found.append(
            run.attempt(lambda: scan(*data, "validation", config.val_difficulty, config.mismatched_pairs, limit))
        )
    for split in found:
        if split is not None:
            run.say("data", split)
    if config.val_steps is None:
        run.say("data", "validation: none, val_steps is null")
    run.attempt(lambda: layout_of(config.dataset_name, config.palette))
    return train


def _report_plan(run: DryRun, train: Scan | None) -> TrainingPlan | None:
    """Prints the launch, the updates and the rate."""
    config, processes = run.config, run.launch.num_processes
    run.say("launch", f"{run.launch}, {_device()}")
    if resumed := run.attempt(lambda: find_resumed(config)):
        state = run.attempt(lambda: checkpoints.read_state(resumed))
        run.updates_done = state.global_step if state else 0
    if train is None:
        run.say("plan", "unknown without the training pairs")
        return None
    stream = run.attempt(lambda: BatchStream(len(train.pairs), config.train_batch_size, config.seed, 0, processes))
    if stream is None:
        return None
    plan = TrainingPlan(config, stream.global_batch_size, stream.batches_per_epoch)
    per_epoch = plan.updates(1)
    length = (
        f"{config.epochs} epochs" if config.max_train_steps is None else f"{plan.total_steps / per_epoch:.3g} epochs"
    )
    run.say("batch", plan.describe_batch())
    done = f", {run.updates_done} of them done" if run.updates_done else ""
    run.say("length", f"{plan.total_steps} updates, {per_epoch} an epoch, {length}{done}")
    source = f" = {config.lr:g} x {plan.effective_batch_size} (scale_lr)" if config.scale_lr else ""
    run.say("rate", f"peak {plan.peak_rate:.3g}{source}; {plan.describe_rate()}")
    return plan


def _find_base(run: DryRun) -> Outline:
    """Returns the base's outline, that of SD3.5 medium where it cannot be had."""
    if outline := run.attempt(lambda: outline_of(run.config.base_model_path)):
        return outline
    from benchmarks.subjects import SD35_TRANSFORMER, SD35_VAE

    run.say("model", "not here; what follows is that of the published SD3.5 medium")
    return Outline(SD35_TRANSFORMER, SD35_VAE, None)


def _find_prompt(run: DryRun, base: Outline) -> EmptyPrompt | None:
    """Returns the empty prompt, if it is at hand; it may have to be computed by encoders that are."""
    config = run.config
    folder = Path(config.base_model_path).expanduser()
    if config.prompt_embeds_path is not None or (folder / PROMPT_FILE_NAME).is_file():
        path = Path(config.prompt_embeds_path or folder / PROMPT_FILE_NAME).expanduser()
        return run.attempt(lambda: EmptyPrompt.from_file(path))
    if base.folder is None:
        return None
    if (cached := prompt_cache_path(base.folder)).is_file():
        return run.attempt(lambda: EmptyPrompt.from_file(cached))
    run.attempt(lambda: resolve_base(str(base.folder), TEXT_PARTS))
    return None


def _report_model(run: DryRun, base: Outline, plan: TrainingPlan | None) -> bool:
    """Prints parameters and memory; returns whether the machine can be expected to train this."""
    config = run.config
    prompt = _find_prompt(run, base)
    if prompt is not None and config.drop_zero_prompt_rows:
        prompt = prompt.without_zero_rows()
    rows = prompt.prompt_embeds.shape[1] if prompt else PROMPT_ROWS // (2 if config.drop_zero_prompt_rows else 1)
    decoder = _decoder_settings(run, base)
    model = run.attempt(lambda: empty_transformer(base.transformer, config, rows))
    if model is None:
        return False
    if prompt is not None:
        run.attempt(lambda: check_prompt(prompt, model))
    parameters = [*model.parameters(), *(empty_decoder(decoder).parameters() if decoder else ())]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in parameters)
    run.say("model", f"{trained / 1e6:,.1f} M of {every / 1e6:,.1f} M parameters are trained")
    _report_checkpoints(run, trained, plan)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "cpu" if every <= MAX_PARAMETERS_ON_CPU and device == "cpu" else "cuda"
    parts = run.attempt(lambda: memory_parts(base.transformer, base.vae, config, run.launch, rows, expected, decoder))
    if parts is None:
        return False
    total = sum(parts.values())
    shown = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    run.say("memory", f"{_size(total)} per process, computed: {shown}")
    if run.launch.offload:
        run.say("", f"and {_size(12 * trained)} of host memory for the optimiser, all processes together")
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _host_memory()
    lasting = total - parts["passes"] - parts["VAE"]
    if device == "cuda" and lasting > memory:
        run.note(
            f"memory: weights, gradients and optimiser take {_size(lasting)}, this card has {_size(memory)}; see the README's table of launches"
        )
    elif device == "cuda" and total > memory:
        run.say(
            "",
            f"that is more than this card's {_size(memory)}; lower train_batch_size, or see the README's table of launches",
        )
    if device == "cpu" and every > MAX_PARAMETERS_ON_CPU:
        run.say("", "this machine has no GPU, which a base of this size needs")
        return False
    return total < memory


def _decoder_settings(run: DryRun, base: Outline) -> dict[str, Any] | None:
    config = run.config
    if config.mask_decoder != "light":
        return None
    folder = run.attempt(lambda: find_mask_decoder(config, base.folder or Path(config.base_model_path)))
    settings = run.attempt(lambda: read_settings(folder)) if folder else None
    if settings and settings.get("lateral_channels") and config.latent_cache == "disk":
        run.note(
            "latent_cache: disk keeps no features of the pictures, which this mask decoder takes; set latent_cache: off"
        )
    return settings


def _report_checkpoints(run: DryRun, trained: int, plan: TrainingPlan | None) -> None:
    if plan is None:
        return
    config, saves = run.config, plan.num_saves(run.updates_done)
    each = bytes_per_parameter(config, run.launch.engine == "ZeRO")
    every = f"every {plan.save_steps} updates" if plan.save_steps else "at the end"
    kept = (
        "all" if config.checkpoints_total_limit is None else f"the newest {config.checkpoints_total_limit} and the best"
    )
    run.say("checkpoints", f"{_size(each * trained)} each, {every}, {saves} in all; {kept} are kept")
    place = _existing(Path(config.output_dir))
    run.attempt(lambda: checkpoints.check_disk_space(place, trained, config.checkpoints_total_limit, saves, each))


def _report_disk(run: DryRun, train: Scan | None) -> None:
    """Prints what is free where the run writes."""
    config = run.config
    places = {"output_dir": Path(config.output_dir)}
    if config.latent_cache == "disk":
        places["latent_cache"] = Path(config.latent_cache_path or places["output_dir"] / "latent_cache")
    for key, path in places.items():
        place = _existing(path)
        if os.path.lexists(path) and not path.is_dir():
            run.note(f"{key}: {path} is no folder; choose another")
            continue
        if not place.is_dir() or not os.access(place, os.W_OK):
            run.note(f"{key}: {path} cannot be written; choose another")
            continue
        free, needed = shutil.disk_usage(place).free, ""
        if key == "latent_cache" and train is not None:
            size = _latent_cache_bytes(config) * len(train.pairs)
            needed = f" needs {_size(size)},"
            if size > free and not path.is_dir():  # one that is there may be full already
                run.note(
                    f"latent_cache: needs {_size(size)}, {_size(free)} are free; set latent_cache_path to another disk"
                )
        run.say("disk", f"{key} {path}:{needed} {_size(free)} free")


def _latent_cache_bytes(config: Config) -> int:
    """Returns what a pair takes in the run's latent cache."""
    flips, variants = (2, config.latent_cache_variants) if config.augmentation else (1, 1)
    latents = LATENT_CHANNELS * (config.resolution // DOWNSCALE) ** 2 * BYTES_PER_VALUE
    return bytes_per_pair(flips * variants, flips, config.resolution, latents)


def _report_time(
    run: DryRun,
    train: Scan | None,
    plan: TrainingPlan | None,
    base: Outline,
    fits: bool,
    make_trainer: Callable[..., Any],
) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", run.launch.num_processes)) == run.launch.num_processes
    reasons = {
        "something is wrong": bool(run.problems) or train is None or plan is None,
        "the base's weights are not on this machine": base.folder is None,
        "this machine is not one to train this base on": not fits,
        "the processes are on several machines": not local,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None or train is None or plan is None:
        run.say(
            "time",
            f"not measured, {reason}; the same command on the machine of the training, once all is right, measures it",
        )
        return
    measured = run.attempt(lambda: measure(run.config, train, make_trainer))
    if measured is None:
        return
    updates, rate = plan.total_steps - run.updates_done, plan.effective_batch_size / measured.seconds
    speed = f"{measured.seconds:.3g} s an update (median of {measured.updates}), {rate:.3g} pictures/s"
    run.say("time", f"{speed}: {_duration(updates * measured.seconds)} for {updates} updates")
    run.say("", "validation, checkpoints and the filling of a latent cache come on top")
    run.say(
        "",
        f"{measured.memory_gb:.3g} GB were held at most meanwhile{'' if torch.cuda.is_available() else ', libraries included'}",
    )


def _device() -> str:
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {_size(properties.total_memory)}"


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    """Returns the path or the nearest folder above that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
