"""Fine-tunes the transformer on pairs of pictures and masks; every key of config.yaml is also a flag."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader

from dataset.sampling import BatchStream, resumed_batch
from dataset.trans10k import PairDataset, Scan, collate, layout_of, prepare_worker, scan
from models.attention import use_plain_attention
from models.base import DTYPES, load_prompt, load_vae, resolve_base
from models.latents import LatentBatches, cut_and_mix
from models.losses import weighted_losses
from models.prompt import EmptyPrompt
from models.trainable import build_trainable, check_settings, mask_decoder_of
from utils import checkpoints
from utils.caching import cached_latents
from utils.checkpoints import TrainingState
from utils.config import Config, parse_config
from utils.dry_run import dry_run
from utils.ema import MovingAverage
from utils.engine import build_accelerator, clip_gradients, engine_name
from utils.errors import InputError, InterruptedRunError, keep_until_exit, run_command
from utils.evaluation import evaluate
from utils.metrics import best_threshold, iou_curves, summarise
from utils.monitor import TrainingMonitor
from utils.optimizers import build_optimizer, set_rate
from utils.panel import Panel
from utils.plan import TrainingPlan
from utils.seeding import Stream, reseed, torch_generator
from utils.signals import StopRequests
from utils.trackers import check_tracker
from utils.training_state import (
    find_resumed,
    prepare_output,
    restore_average,
    restore_optimizer,
    restore_raw_weights,
    save_training,
)

DRY_RUN_HELP = "print what the training would do, need and take, and all that is wrong, then leave; nothing is written"


class Trainer:
    """One training run: builds everything, then `train` loops, validates and saves, or `rehearse` leaves nothing behind.

    Args:
        config: of the run.
        accelerator: of the run.
        train: pairs to train on.
        validation: pairs to score; None: no validation.
        stop: asked before every update.
        make_plan: turns the configuration into updates and rates.
    """

    transformer: Any
    optimizer: Any
    saved_step: int

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        train: Scan,
        validation: Scan | None,
        stop: StopRequests,
        make_plan: Callable[[Config, int, int], TrainingPlan] = TrainingPlan,
    ):
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.resumed = find_resumed(config)
        self._load_models()
        self._make_plan(train, make_plan)
        self._load_data(train, validation)
        self.num_parameters = sum(
            parameter.numel() for parameter in self.transformer.parameters() if parameter.requires_grad
        )
        self.optimizer = build_optimizer(self.transformer, config, self.plan.peak_rate)
        if self.resumed:
            restore_raw_weights(self.resumed, self.transformer)
        # The engine moves the weights to its device, and may keep copies of its own of what they are now.
        self.transformer, self.optimizer = accelerator.prepare(self.transformer, self.optimizer)
        self.average = (
            MovingAverage(accelerator.unwrap_model(self.transformer), config.ema_decay) if config.ema_decay else None
        )
        if self.resumed:
            restore_optimizer(accelerator, config, self.resumed, self.transformer, self.optimizer)
            if self.average:
                restore_average(self.resumed, self.average)

    def train(self) -> None:
        """Runs the remaining updates.

        Raises:
            InterruptedRunError: after a signal, once the state is saved.
            TrainingDivergedError: if the loss is not finite; nothing is saved then.
            InputError: if the run's folder cannot be written or the disk is too small.
        """
        prepare_output(self.accelerator, self.config, self.plan, self.num_parameters, self.global_step)
        batches = self._start(self.config.output_dir)
        try:
            if (
                self.resumed
                and self._is_due(self.config.val_steps)
                and not self.monitor.has_validated(self.global_step)
            ):
                self._validate()
            while self.global_step < self.plan.total_steps:
                self._leave_if_asked()
                self._update(batches)
                if self._is_due(self.plan.save_steps) or self.global_step == self.plan.total_steps:
                    self._save()
                if self._is_due(self.config.val_steps):
                    self._validate()
        except InterruptedRunError as error:
            self._save()
            self.monitor.close()
            saved = f"saved update {self.global_step}" if self.global_step else "no update was done"
            raise InterruptedRunError(f"{error}; {saved}", error.exit_code) from error
        except InputError:
            # A broken file is found on one process only, and saving needs them all.
            if self.accelerator.num_processes == 1:
                self._save()
            raise
        finally:
            self.monitor.bar.close()
        self.monitor.close()

    def rehearse(self) -> Generator[dict[str, float], None, None]:
        """Runs the updates and yields the row that each would write to the history; nothing is written, scored or saved.

        Raises:
            InterruptedRunError: after a signal.
            TrainingDivergedError: if the loss is not finite.
        """
        batches = self._start(None)
        try:
            while self.global_step < self.plan.total_steps:
                self._leave_if_asked()
                self._update(batches)
                yield self.monitor.row
        finally:
            self.monitor.bar.close()

    def _start(self, output_dir: str | None) -> Iterator[dict[str, Any]]:
        """Begins to watch, and returns the batches."""
        self.monitor = TrainingMonitor(
            self.accelerator,
            output_dir,
            self.global_step,
            self.plan.total_steps,
            self.plan.effective_batch_size,
            self.config.log_steps,
        )
        encode = (self.pipeline.encode_images, self.pipeline.encode_labels)
        return iter(LatentBatches(self.monitor.timed(self.loader), *encode, self.accelerator.device))

    def _update(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimiser update over `gradient_accumulation_steps` batches."""
        rate = self.plan.rate(self.global_step)
        set_rate(self.optimizer, rate)
        grad_norm = None
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            if self.config.cutmix:
                batch = cut_and_mix(batch, self.config.cutmix, self.config.seed)
            with self.accelerator.accumulate(self.transformer):
                losses = self._losses(batch)
                self.accelerator.backward(losses["loss"].mean())
                if self.accelerator.sync_gradients:
                    grad_norm = clip_gradients(self.accelerator, self.transformer, self.config.max_grad_norm)
                # Here and not earlier: a loader that starts draws from the same generator as the rounding of the weights.
                reseed(Stream.ROUNDING, self.config.seed, self.global_step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.monitor.record_batch(self.global_step + 1, losses, batch["file"])
        self.global_step += 1
        if self.average:
            self.average.update(self.global_step)
        self.batches_seen += self.config.gradient_accumulation_steps
        self.monitor.record_norm(self.global_step, grad_norm)
        self.monitor.finish_update(
            self.global_step, self._epoch(), rate, grad_norm, self.config.gradient_accumulation_steps
        )

    def _losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the named losses of a batch, each (B,)."""
        generators = [
            torch_generator(Stream.TRAINING_NOISE, self.config.seed, epoch, index)
            for epoch, index in zip(batch["epoch"], batch["index"], strict=True)
        ]
        estimate = self.pipeline.objective.loss(
            self.transformer, batch["image_latents"], batch["mask_latents"], self.prompt, generators
        )
        weights = (self.config.latent_loss_weight, self.config.pixel_loss_weight, self.config.edge_weight)
        read_logits = partial(self.pipeline.read_logits, features=batch["features"])
        # The mask decoder is called beside the transformer, which engines cast by themselves.
        with self.accelerator.autocast():
            return weighted_losses(estimate, batch["label"], read_logits, *weights)

    def _validate(self) -> None:
        """Scores the validation split; a new best checkpoint is saved at once."""
        if self.validation_data is None:
            return
        vae_device = self.pipeline.vae.device
        self.pipeline.vae.to(self.accelerator.device)
        self.transformer.eval()
        panel = Panel(self.validation_data.pairs)
        with self.average.in_place() if self.average else nullcontext(), self.accelerator.autocast():
            found = evaluate(
                self.pipeline,
                self.validation_data,
                self.accelerator,
                batch_size=self.config.test_batch_size,
                seed=self.config.seed,
                num_workers=self.config.dataloader_num_workers,
                write=panel.write,
                poll_stop=self.stop.poll,
                description="validation",
            )
        panel.gather(self.accelerator, found.scores)
        self.transformer.train()
        self.pipeline.vae.to(vae_device)
        summary = summarise(found.scores)
        # One process decides: saving is collective, and a shared disk may show each process another state.
        threshold, best_iou = best_threshold(iou_curves(found.histograms))
        iou = best_iou if self.config.threshold == "validation" else summary["iou"]
        best = checkpoints.read_best(self.config.output_dir)
        if broadcast_object_list([best is None or iou > best["iou"]])[0]:
            self._save()
            if self.accelerator.is_main_process:
                limit = self.config.checkpoints_total_limit
                checkpoints.mark_best(self.config.output_dir, self.global_step, iou, limit, threshold)
        self.monitor.record_validation(self.global_step, self._epoch(), summary, panel)

    def _save(self) -> None:
        """Saves a checkpoint of this update, once."""
        if self.saved_step == self.global_step:
            return
        self.monitor.check_finite(self.global_step)
        parts = (self.transformer, self.optimizer, self.prompt, self.average)
        save_training(self.accelerator, self.config, self._state(), *parts)
        self.saved_step = self.global_step

    def _load_models(self) -> None:
        """Loads VAE, transformer and prompt."""
        config, device = self.config, self.accelerator.device
        with self.accelerator.local_main_process_first():
            base = resolve_base(config.base_model_path)
            self.prompt: EmptyPrompt = (
                EmptyPrompt.from_file(self.resumed / checkpoints.PROMPT_FILE_NAME)
                if self.resumed
                else load_prompt(config.base_model_path, config.prompt_embeds_path)
            ).to(device)
        vae = load_vae(base, DTYPES[config.data_type], config.compile).to(device)
        if config.gradient_checkpointing:  # for a loss on the pixels that it decodes
            vae.enable_gradient_checkpointing()
        if config.drop_zero_prompt_rows:
            self.prompt = self.prompt.without_zero_rows()
        self.transformer = build_trainable(config, base, self.resumed, self.prompt, vae)
        if device.type == "cpu" and not config.compile:
            use_plain_attention(self.transformer)
        # What validation calls also holds the formulas that training uses.
        palette = layout_of(config.dataset_name, config.palette).palette
        parts = (self.transformer, vae, self.prompt, mask_decoder_of(self.transformer), palette)
        self.pipeline = checkpoints.build_pipeline(config, base, *parts)

    def _make_plan(self, train: Scan, make_plan: Callable[[Config, int, int], TrainingPlan]) -> None:
        """Turns epochs into updates; knows where a resumed run stands."""
        config, accelerator = self.config, self.accelerator
        arguments = (len(train.pairs), config.train_batch_size, config.seed)
        self.stream = BatchStream(*arguments, accelerator.process_index, accelerator.num_processes)
        self.plan = make_plan(config, self.stream.global_batch_size, self.stream.batches_per_epoch)
        self.global_step = self.batches_seen = 0
        if self.resumed:
            state = checkpoints.read_state(self.resumed)
            self.global_step = state.global_step
            self.batches_seen = resumed_batch(
                state.batches_seen, state.global_batch_size, self.stream.global_batch_size, len(train.pairs)
            )
            if (state.num_pairs, state.global_batch_size) != (len(train.pairs), self.stream.global_batch_size):
                accelerator.print(
                    f"warning: resuming with {len(train.pairs)} pairs and a global batch of {self.stream.global_batch_size}, "
                    f"the checkpoint had {state.num_pairs} and {state.global_batch_size}: the training goes on at the same "
                    "share of its epoch, and its length counts updates"
                )
        self.saved_step = self.global_step
        remaining = max(0, self.plan.total_steps - self.global_step)
        self.stream.start = self.batches_seen
        self.stream.stop = self.batches_seen + remaining * config.gradient_accumulation_steps
        resuming = f"; resuming {self.resumed} at update {self.global_step}" if self.resumed else ""
        accelerator.print(f"{self.plan}{resuming}{'' if remaining else '; nothing is left to train'}")

    def _load_data(self, train: Scan, validation: Scan | None) -> None:
        config = self.config
        reader = layout_of(config.dataset_name, config.palette).read_label
        if config.latent_cache == "disk":
            if self.pipeline.mask_decoder is not None and self.pipeline.mask_decoder.takes_features:
                raise InputError(
                    "latent_cache: disk keeps no features of the pictures, which this mask decoder takes; set latent_cache: off, "
                    "or mask_decoder_path to one trained without --lateral"
                )
            data: Any = cached_latents(config, train.pairs, self.pipeline, self.accelerator, self.stop.noticed)
            if config.mask_decoder == "light" or not config.pixel_loss_weight:
                self.pipeline.vae.to("cpu")  # until validation
        else:
            seed = config.seed if config.augmentation else None
            data = PairDataset(train.pairs, reader, config.resolution, augmentation_seed=seed)
        self.loader = DataLoader(
            data,
            batch_sampler=self.stream,
            num_workers=config.dataloader_num_workers,
            collate_fn=collate,
            worker_init_fn=prepare_worker,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.validation_data = PairDataset(validation.pairs, reader, config.resolution) if validation else None

    def _state(self) -> TrainingState:
        scaler = self.accelerator.scaler
        return TrainingState(
            global_step=self.global_step,
            batches_seen=self.batches_seen,
            global_batch_size=self.stream.global_batch_size,
            num_pairs=self.stream.num_samples,
            num_processes=self.accelerator.num_processes,
            engine=engine_name(self.accelerator),
            grad_scaler=scaler.state_dict() if scaler is not None else None,
        )

    def _epoch(self) -> float:
        return round(self.batches_seen / self.stream.batches_per_epoch, 4)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.global_step % every == 0 or self.global_step == self.plan.total_steps)

    def _leave_if_asked(self) -> None:
        if code := self.stop.poll():
            raise InterruptedRunError("asked to stop", code)


def main() -> int:
    """Command line of the trainer."""
    config, given = parse_config(sys.argv[1:], __doc__ or "", {"dry_run": DRY_RUN_HELP})
    if "dry_run" in given:
        return dry_run(config, Trainer)
    check_settings(config)
    stop = StopRequests()
    trackers = check_tracker(config.tracker)
    data = (config.dataset_name, config.dataset_path)
    train = scan(*data, "train", mismatched_pairs=config.mismatched_pairs)
    validation = None
    if config.val_steps is not None:
        limit = config.num_vals_train
        validation = scan(*data, "validation", config.val_difficulty, config.mismatched_pairs, limit)
    accelerator = build_accelerator(config, trackers)
    stop.share()
    for found in (train, validation):
        accelerator.print(found if found else "validation: none, val_steps is null")
    set_seed(config.seed)
    trainer = keep_until_exit(Trainer(config, accelerator, train, validation, stop))
    trainer.train()
    return 0


if __name__ == "__main__":
    run_command(main)
