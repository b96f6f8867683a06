"""Every fine-tuning of a study: done once, cached by content, with the learning rate chosen."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import Progress
from torch import nn

import tangentfast as tf
from tangentfast.files import link

from .cache import digest
from .parts import Parts
from .regimes import REGIMES
from .train import DivergedError, Finetuned, TrainOptions, finetune

__all__ = ["Tuning", "Tunings"]


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning: `regime` is one that trains."""

    regime: str
    task: str
    seed: int
    lr: float
    train_head: bool = False


class Tunings:
    """The fine-tunings of a study, each done when it is first asked for.

    Args:
        parts: of the study.
        progress: shows the one that runs.
    """

    def __init__(self, parts: Parts, progress: Progress) -> None:
        self.parts = parts
        self.progress = progress

    @property
    def regimes(self) -> list[str]:
        """Those that train: a post-hoc regime asks for the one whose vectors it takes."""
        chosen = (REGIMES[name] for name in self.parts.config.train.regimes)
        return list(dict.fromkeys(regime.vectors_of or regime.name for regime in chosen))

    def complete(self) -> None:
        """Do all that the headline needs, and put its vectors under ``vectors/``."""
        train, out = self.parts.config.train, self.parts.config.out
        for regime in self.regimes:
            for seed in train.seeds:
                for tuning in self.headline(regime, seed):
                    self.vector(tuning)
                    folder = out / "vectors" / tuning.regime / _file_name(tuning.task)
                    made = self._folder(tuning) / "vector.safetensors"
                    folder.mkdir(parents=True, exist_ok=True)
                    link(made, folder / f"seed{seed}.safetensors")

    def headline(self, regime: str, seed: int) -> list[Tuning]:
        """The fine-tunings of all tasks that a regime is evaluated with, at its chosen rate."""
        config, name = self.parts.config, REGIMES[regime].vectors_of or regime
        lr, _ = self.chosen_lr(name)
        return [Tuning(name, task, seed, lr, config.head.train) for task in config.data.tasks]

    def chosen_lr(self, regime: str) -> tuple[float, dict[float, float]]:
        """The rate with the best mean validation accuracy, and the accuracy of each.

        Over the tasks of ``train.lr_tasks``, with the first seed; of equal ones the smallest. A
        rate at which training diverged counts as 0. Task vectors of the others are removed.

        Raises:
            DivergedError: training diverged at every rate.
        """
        config = self.parts.config
        grid = {
            lr: [
                Tuning(regime, task, config.train.seeds[0], lr, config.head.train)
                for task in config.train.lr_tasks or config.data.tasks
            ]
            for lr in sorted(config.train.lr)
        }
        summaries = {lr: [self.summary(tuning) for tuning in row] for lr, row in grid.items()}
        accuracy = {lr: fmean(f["val_accuracy"] for f in row) for lr, row in summaries.items()}
        for lr, row in summaries.items():
            if any("diverged" in summary for summary in row):
                accuracy[lr] = 0.0
        best = max(accuracy, key=lambda lr: accuracy[lr])
        if diverged := [f["diverged"] for f in summaries[best] if "diverged" in f]:
            raise DivergedError(f"{regime} diverged at every rate of train.lr; {diverged[0]}")
        for lr, losers in grid.items():
            for tuning in losers if lr != best else ():
                shutil.rmtree(self._folder(tuning), ignore_errors=True)
        return best, accuracy

    def summary(self, tuning: Tuning) -> dict[str, Any]:
        """`Finetuned` without its tensors; also ``diverged``, the message, where training did."""

        def compute() -> dict[str, Any]:
            try:
                return _summary(self._finetune(tuning))
            except DivergedError as error:
                return {"val_accuracy": 0.0, "diverged": str(error)}

        summary: dict[str, Any] = self.parts.cache.get(
            digest("figures", self._key(tuning)), compute
        )
        return summary

    def vector(self, tuning: Tuning) -> tf.TaskVector:
        """τ, on the CPU."""
        return self._finetune(tuning).vector

    def head(self, tuning: Tuning) -> nn.Module:
        """The head it ends with: the frozen one, or a trained copy."""
        head = self.parts.head(tuning.task)
        if tuning.train_head:
            head = copy.deepcopy(head)
            head.load_state_dict(self._finetune(tuning).head or {})
        return head

    def _options(self, tuning: Tuning) -> TrainOptions:
        config = self.parts.config
        train = config.train
        return TrainOptions(
            steps=config.steps(tuning.task, len(self.parts.task(tuning.task).train)),
            lr=tuning.lr,
            batch=train.batch,
            accumulate=train.accumulate,
            weight_decay=train.weight_decay,
            decay=train.decay,
            warmup=train.warmup,
            clip=train.clip,
            label_smoothing=train.label_smoothing,
            precision=train.precision,
            train_head=tuning.train_head,
        )

    def _key(self, tuning: Tuning) -> str:
        """All that a task vector depends on."""
        parts = self.parts
        head, data = parts.head(tuning.task), parts.data(tuning.task)
        return digest(parts.base, data, head, tuning.regime, tuning.seed, self._options(tuning))

    def _folder(self, tuning: Tuning) -> Path:
        return self.parts.cache.folder / "finetuned" / self._key(tuning)

    def _finetune(self, tuning: Tuning) -> Finetuned:
        parts, options = self.parts, self._options(tuning)
        name = f"{tuning.regime}-{tuning.task}-seed{tuning.seed}-lr{tuning.lr:g}"
        name = _file_name(name) + ("-head" if tuning.train_head else "")
        progress_bar = self.progress.add_task(name, total=options.steps, speed="")

        def advance(step: int, speed: float) -> None:
            self.progress.update(progress_bar, completed=step, speed=f"{speed:.0f} images/s")

        try:
            return finetune(
                parts.encoder,
                parts.head(tuning.task),
                parts.task(tuning.task),
                REGIMES[tuning.regime],
                options,
                seed=tuning.seed,
                out=self._folder(tuning),
                device=parts.config.device,
                log=parts.config.out / "logs" / f"{name}.jsonl",
                checkpoint=parts.config.train.checkpoint,
                advance=advance,
            )
        finally:
            self.progress.remove_task(progress_bar)


def _summary(finetuned: Finetuned) -> dict[str, Any]:
    return {
        "val_accuracy": finetuned.val_accuracy,
        "seconds_per_step": finetuned.seconds_per_step,
        "samples_per_second": finetuned.samples_per_second,
        "peak_bytes": finetuned.peak_bytes,
        "trained_parameters": finetuned.trained_parameters,
    }


def _file_name(name: str) -> str:
    """Of a task, which may be a path."""
    return re.sub(r"[^\w.+-]+", "_", name)
