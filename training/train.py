"""The training loop: labelled frames in, checkpoint out.

In the folder of a run: model.safetensors (what export takes), recipe.yaml, resume.pt (what the run goes on from),
log.jsonl, tensorboard/, and non_finite_batch.pt after a loss that was no number.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models.backbone import freeze_stages
from ..models.config import PSDiffConfig
from ..models.person_search import PSDiff, save_checkpoint
from . import processes
from .dataset import Batch, CanvasFrames, FrameSource, frame_batches
from .noising import image_generator
from .objective import Objective, denoising_objective
from .progress import Progress, RunLog, RunningAverages, Stopwatch
from .recipe import Recipe, Stage, save_recipe
from .resume import RECIPE, STATE, ResumeError, RunState, load_state, recipe_key, save_state
from .sources import check_embedding_dim, open_source
from .start import resized, start, start_again

CHECKPOINT = "model.safetensors"
NON_FINITE_BATCH = "non_finite_batch.pt"

# More images than any run reads; the loader counts them lazily.
ENDLESS = 1 << 40

# `steps`: 70k and 84k of the paper's 90k iterations. `cosine`: constant for half a stage, down to FINAL_RATE.
STEP_SHARES = (70 / 90, 84 / 90)
CONSTANT_SHARE, FINAL_RATE = 0.5, 0.02
WARMUP_START = 0.01


class NonFiniteLossError(RuntimeError):
    """The loss is not a number; training stopped and the last checkpoint is good."""


def train(
    recipe: Recipe,
    out: Path,
    *,
    backbone_weights: str | None = None,
    init: Path | None = None,
    frames_folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Run the recipe's stages; return the checkpoint's path.

    Under torchrun the processes share each batch; the first writes. backbone_weights: see
    models.backbone.initial_weights; None starts from random weights. init: a checkpoint to start from instead,
    whatever the recipe's preset. frames_folder: where drawn frames are kept, default out. resume: go on from
    out/resume.pt to the same weights as if the run had never stopped; backbone_weights and init are of no
    account. device: cpu or cuda; under torchrun each process takes the cuda device of its local rank. Raises
    ResumeError, RecipeError, StartError, DatasetError and CacheError before anything is written, and
    NonFiniteLossError.
    """
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if not resume and (out / STATE).exists():
        raise ResumeError(
            f"out must be a new folder, got {out} with a run in it; add --resume, or choose another"
        )
    state = load_state(out, recipe, processes.count()) if resume else None
    model, notes = start(recipe, backbone_weights, init) if state is None else start_again(state)
    source = open_source(recipe, frames_folder or out)
    check_embedding_dim(source, model.config)
    out.mkdir(parents=True, exist_ok=True)
    with (
        processes.together(device) as place,
        closing(
            RunLog(out, enabled=processes.is_first(), resumed_at=state.samples if state else None)
        ) as log,
    ):
        if processes.is_first():
            save_recipe(recipe, out / RECIPE)
        final, samples = model.config, 0
        for number, stage in enumerate(recipe.stages):
            model = resized(model, stage.width, stage.height, reference=final).to(place)
            if state is not None and number < state.stage:
                continue
            trainer = _Trainer(model, recipe, number, reference=final, out=out, notes=notes, log=log)
            trainer.samples = samples
            if state is not None and number == state.stage:
                trainer.restore(state)
            trainer.run(source, on_progress)
            samples, notes = trainer.samples, trainer.notes
    return out / CHECKPOINT


class _Step(nn.Module):
    """Model and objective as one module, so that DistributedDataParallel can average the gradients."""

    def __init__(self, model: PSDiff, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: Batch) -> Objective:
        """Batch on the CPU -> its loss on the device of the model."""
        device = next(self.model.parameters()).device
        generators = [image_generator(self.recipe.seed, sample) for sample in batch.samples]
        # Swin drops paths by the global generator: a resumed run must drop the same ones.
        torch.manual_seed(generators[0].initial_seed())
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            features = [level.float() for level in self.model.backbone(batch.images.to(device))]
            return denoising_objective(self.model.denoiser, features, batch.people, self.recipe, generators)


class _Losses(NamedTuple):
    """The means over all processes of one step of the optimizer."""

    total: float
    classification: float
    l1: float
    giou: float
    reid: float


class _Trainer:
    """One stage: model, optimizer, and what is reported of them."""

    def __init__(
        self,
        model: PSDiff,
        recipe: Recipe,
        number: int,
        *,
        reference: PSDiffConfig,
        out: Path,
        notes: dict[str, Any],
        log: RunLog,
    ) -> None:
        self.recipe, self.number, self.stage = recipe, number, recipe.stages[number]
        self.model, self.reference = model.train(), reference
        self.out, self.notes, self.log = out, notes, log
        freeze_stages(model.backbone, recipe.frozen_stages)
        body = [p for p in model.backbone.stages.parameters() if p.requires_grad]
        rest = [*model.backbone.fpn.parameters(), *model.denoiser.parameters()]
        self.parameters = body + rest
        self.optimizer = torch.optim.AdamW(
            [{"params": body, "factor": recipe.backbone_learning_rate}, {"params": rest, "factor": 1.0}],
            lr=self.stage.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        self.step: nn.Module = _Step(model, recipe)
        if processes.count() > 1:
            self.step = DistributedDataParallel(self.step, broadcast_buffers=False)
        self.average = None
        if recipe.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        self.averages = RunningAverages()
        self.iteration, self.samples, self.seconds = 0, 0, 0.0

    def restore(self, state: RunState) -> None:
        """Go back to where a run was; the optimizer's moments included."""
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self.average is not None and state.average is not None:
            self.average.load_state_dict(state.average)
        self.averages = RunningAverages(state.averages)
        self.iteration, self.samples, self.seconds = state.iteration, state.samples, state.seconds
        self.notes = json.loads(state.notes)

    def run(self, source: FrameSource, on_progress: Callable[[Progress], None]) -> None:
        """Train to the end of the stage and save."""
        watch, saved = Stopwatch(), time.monotonic()
        before, images = self.seconds, 0
        batches = watch.watch(self._batches(source))
        # The first process's clock decides for all, or they would leave the loop apart.
        while (share := processes.of_first(self._share())) < 1:
            self._set_learning_rate(share)
            micro_batches = [next(batches) for _ in range(self.stage.accumulate)]
            losses, image_cosine = self._optimize(micro_batches)
            images += self._images_a_step
            self.seconds = before + watch.seconds
            self._record(losses, image_cosine)
            on_progress(
                Progress(
                    stage=self.number,
                    share=min(1.0, self._share()),
                    iteration=self.iteration,
                    images_per_s=images / watch.seconds,
                    loader_share=watch.waited / watch.seconds,
                    loss=self.averages.values["total"],
                    image_cosine=self.averages.values.get("image_cosine", 0.0),
                )
            )
            if time.monotonic() - saved > 60 * self.recipe.save_every_minutes:
                self._save()
                saved = time.monotonic()
        self._save()
        # After the state: a run that is killed here and resumed ends the stage, and notes it, once.
        self.notes.setdefault("stages", []).append(self._stage_notes())
        self._save_checkpoint()

    def _batches(self, source: FrameSource) -> Iterable[Batch]:
        indices = range(self.samples + processes.rank(), ENDLESS, processes.count())
        frames = CanvasFrames(
            source, indices, seed=self.recipe.seed, width=self.stage.width, height=self.stage.height
        )
        return frame_batches(frames, batch_size=self.stage.batch_size, workers=self.recipe.loader_workers)

    def _optimize(self, micro_batches: list[Batch]) -> tuple[_Losses, float | None]:
        """One step of the optimizer on the mean gradient of the micro-batches."""
        self.optimizer.zero_grad()
        losses, cosines = [], []
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            # The processes exchange gradients once, after the last micro-batch.
            waits = isinstance(self.step, DistributedDataParallel) and not is_last
            with self.step.no_sync() if waits else nullcontext():  # pyright: ignore[reportCallIssue]
                objective: Objective = self.step(batch)
                loss = _Losses(*processes.mean(torch.stack([objective.loss.total, *objective.loss])).tolist())
                if not math.isfinite(loss.total):
                    self._stop(batch, f"loss must be finite, got {loss._asdict()}", objective.loss.total)
                (objective.loss.total / len(micro_batches)).backward()
            losses.append(loss)
            cosines += [] if objective.image_cosine is None else [objective.image_cosine]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_gradient_norm)
        if not norm.isfinite():
            self._stop(micro_batches[-1], f"norm of the gradient must be finite, got {norm.item()}", norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.iteration += 1
        self.samples += self._images_a_step
        means = _Losses(*(sum(parts) / len(losses) for parts in zip(*losses, strict=True)))
        return means, sum(cosines) / len(cosines) if cosines else None

    @property
    def _images_a_step(self) -> int:
        return self.stage.batch_size * self.stage.accumulate * processes.count()

    def _stop(self, batch: Batch, message: str, own: Tensor) -> NoReturn:
        """Keep the batch of a process whose own number is not finite; all of them stop."""
        path = self.out / NON_FINITE_BATCH
        if not own.isfinite():
            temporary = path.with_name(f".{path.name}-{processes.rank()}")
            kept = {
                "samples": batch.samples,
                "images": batch.images,
                "people": [tuple(p) for p in batch.people],
            }
            torch.save(kept, temporary)
            temporary.replace(path)
        raise NonFiniteLossError(
            f"{message}, at iteration {self.iteration} of stage {self.number}; the batch is in {path}; train again "
            f"with a lower learning_rate into another folder, where there is one from --init {self.out / CHECKPOINT}"
        )

    def _record(self, losses: _Losses, image_cosine: float | None) -> None:
        values = losses._asdict()
        if image_cosine is not None:
            values["image_cosine"] = image_cosine
        for name, value in values.items():
            self.averages.add(name, value)
        rate = self.optimizer.param_groups[-1]["lr"]
        self.log.scalars(self.averages.values | {"learning_rate": rate}, self.iteration, self.samples)

    def _share(self) -> float:
        by_iterations = self.iteration / self.stage.iterations if self.stage.iterations else 0.0
        by_minutes = self.seconds / 60 / self.stage.minutes if self.stage.minutes else 0.0
        return max(by_iterations, by_minutes)

    def _set_learning_rate(self, share: float) -> None:
        factor = learning_rate_factor(self.stage, self.iteration, share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * group["factor"] * factor

    def _save(self) -> None:
        if not processes.is_first():
            return
        self.notes["frames"] = self.samples
        save_state(self._state(), self.out)
        self._save_checkpoint()
        minutes = round(self.seconds / 60, 2)
        self.log.line(
            {"stage": self.number, "iteration": self.iteration, "minutes": minutes, **self.averages.values}
        )

    def _save_checkpoint(self) -> None:
        if processes.is_first():
            averaged = self.model if self.average is None else self.average.module
            assert isinstance(averaged, PSDiff)
            save_checkpoint(averaged, self.out / CHECKPOINT, self.notes)

    def _state(self) -> RunState:
        return RunState(
            recipe=recipe_key(self.recipe),
            processes=processes.count(),
            config=self.reference.model_dump_json(),
            stage=self.number,
            iteration=self.iteration,
            samples=self.samples,
            seconds=self.seconds,
            model=self.model.state_dict(),
            average=None if self.average is None else self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            averages=self.averages.values,
            notes=json.dumps(self.notes),
        )

    def _stage_notes(self) -> dict[str, Any]:
        return {
            "width": self.stage.width,
            "height": self.stage.height,
            "batch_size": self.stage.batch_size * self.stage.accumulate,
            "processes": processes.count(),
            "iterations": self.iteration,
            "minutes": round(self.seconds / 60, 1),
            "images_per_s": round(self.iteration * self._images_a_step / self.seconds, 2),
        }


def learning_rate_factor(stage: Stage, iteration: int, share: float) -> float:
    """What the stage's learning rate is multiplied with: linear warm-up, then the decay of the recipe."""
    progress = min(1.0, iteration / stage.warmup_iterations) if stage.warmup_iterations else 1.0
    warmup = WARMUP_START + (1 - WARMUP_START) * progress
    if stage.decay == "steps":
        return warmup * 0.1 ** sum(share >= milestone for milestone in STEP_SHARES)
    if stage.decay == "cosine":
        falling = max(0.0, share - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
        return warmup * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * falling)))
    return warmup
