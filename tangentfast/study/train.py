"""Fine-tuning of one task in one regime: τ, what it cost, and how well it does on validation."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

import tangentfast as tf
from tangentfast.fingerprint import fingerprint

from .files import replacing, write_json
from .log import Log
from .memory import PeakMemory
from .regimes import Regime
from .trainee import Trainee, TrainOptions, learning_rate

if TYPE_CHECKING:
    from .data import Split, Task
    from .encoders import Encoder

__all__ = ["DivergedError", "Finetuned", "TrainOptions", "finetune", "sample_order"]

LEFT_OUT = 3  # first steps, in which libraries set themselves up


class DivergedError(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Finetuned:
    """One task's fine-tuning.

    Attributes:
        vector: τ = θ − θ0 of the trained parameters, on the CPU.
        head: the state of the trained head; None where the head was frozen.
        seconds_per_step: median, without the first steps; loading of images counts.
        samples_per_second: training images, by that median.
        peak_bytes: growth of memory over what rested before; 0 where it cannot be measured.
        val_accuracy: 0 to 1, of the regime's own model.
        trained_parameters: numbers in τ.
    """

    vector: tf.TaskVector
    head: dict[str, Tensor] | None
    seconds_per_step: float
    samples_per_second: float
    peak_bytes: int
    val_accuracy: float
    trained_parameters: int


def finetune(
    encoder: Encoder,
    head: nn.Module,
    task: Task,
    regime: Regime,
    options: TrainOptions,
    *,
    seed: int,
    out: Path,
    device: str,
    log: Path | None = None,
    checkpoint: float = 120.0,
    advance: Callable[[int, float], None] | None = None,
) -> Finetuned:
    """Fine-tune on a task, or go on where an interrupted call with the same arguments stopped.

    The result is the same bit for bit, interrupted or not: images come in an order that depends on
    seed and step alone, and the network is in evaluation mode (no dropout, frozen statistics).
    θ0 and `head` are left as they are. In bfloat16 a tangent regime casts θ0 once, the others run
    under autocast.

    Args:
        encoder: at θ0, on `device`.
        head: features [N, D] → logits [N, C], on `device`; frozen unless `options.train_head`.
        task: its training and validation splits are used.
        regime: one that trains.
        options: see `TrainOptions`.
        seed: of the order of images.
        out: a folder for this fine-tuning alone: checkpoint, and what it gave in the end. A
            finished one is read from there.
        device: as torch names it.
        log: a file of JSON lines (step, loss, lr, grad_norm, images_per_second); in `out` by
            default.
        checkpoint: seconds between checkpoints; an interrupt or an error leaves one too.
        advance: called after each step with the number of steps done and images per second.

    Raises:
        ValueError: the regime trains nothing; `out` is another fine-tuning's; the head has nothing
            to train.
        DivergedError: the loss is not finite.
        OSError: `out` cannot be written. What was complete before still is.
    """
    if regime.vectors_of is not None:
        raise ValueError(
            f"finetune: {regime.name} trains nothing; expected a regime that does, such as "
            f"{regime.vectors_of}, whose task vectors it takes"
        )
    theta0 = fingerprint(dict(encoder.module.named_parameters()))
    identity = json.dumps(
        [encoder.name, theta0, task.name, regime.name, asdict(options), seed], sort_keys=True
    )
    if finished := _finished(out, identity):
        return finished
    memory = PeakMemory(torch.device(device))
    trainee = Trainee(encoder, head, regime, options, device)
    file = out / "checkpoint.pt"
    seconds, peak = _restore(trainee, file, identity)

    def save() -> None:
        trainee.save(file, identity=identity, seconds=seconds, peak=max(peak, memory.bytes()))

    batches = _batches(task.train, options, seed, len(seconds), pin=trainee.device.type == "cuda")
    with closing(batches), closing(Log(log or out / "log.jsonl", done=len(seconds))) as journal:
        saved = time.perf_counter()
        try:
            while trainee.steps < options.steps:
                began = time.perf_counter()
                rate = learning_rate(trainee.steps, options.steps, options.lr, options.warmup)
                loss, norm = trainee.step(batches, rate)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"finetune: the loss of {task.name} ({regime.name}, lr {options.lr:g}) is "
                        f"{loss} at step {trainee.steps}; expected a finite one: take a smaller lr"
                    )
                now = time.perf_counter()
                speed = options.batch * options.accumulate / (now - began)
                journal.write(
                    trainee.steps, loss=loss, lr=rate, grad_norm=norm, images_per_second=speed
                )
                seconds.append(now - began)
                if advance is not None:
                    advance(trainee.steps, speed)
                if now - saved > checkpoint:
                    save()
                    saved = now
        except BaseException:
            if trainee.steps == len(seconds) > 0:  # else in the middle of a step's update
                with contextlib.suppress(OSError):  # a full disk is what is being raised
                    save()
            raise
    median = statistics.median(seconds[min(LEFT_OUT, len(seconds) // 2) :])
    summary: dict[str, Any] = {
        "seconds_per_step": median,
        "samples_per_second": options.batch * options.accumulate / median,
        "peak_bytes": max(peak, memory.bytes()),
        "val_accuracy": trainee.accuracy(task.val),
        "trained_parameters": sum(p.numel() for p in trainee.trained.values()),
    }
    out.mkdir(parents=True, exist_ok=True)
    vector, trained_head = trainee.vector(), trainee.head_state()
    vector.save(out / "vector.safetensors")
    if trained_head is not None:
        with replacing(out / "head.safetensors") as opened:
            opened.write(safetensors_bytes(trained_head))
    write_json(
        out / "result.json", {"identity": identity, "figures": summary}
    )  # last: all is there
    file.unlink(missing_ok=True)
    return Finetuned(vector, trained_head, **summary)


def sample_order(seed: int, images: int, start: int, count: int) -> Tensor:
    """Which images the samples `start` to `start + count` of a training are: int64 [count].

    One permutation after another, each made from (seed, epoch) alone, so that any part of the
    order can be had without what precedes it; batches run across the ends of epochs.
    """
    first, last = start // images, (start + count - 1) // images
    epochs = [
        np.random.default_rng([seed, epoch]).permutation(images) for epoch in range(first, last + 1)
    ]
    offset = start - first * images
    return torch.from_numpy(np.concatenate(epochs)[offset : offset + count])


def _batches(
    split: Split, options: TrainOptions, seed: int, steps: int, pin: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images uint8 [B, 3, S, S] and labels [B] after so many steps, read one batch ahead."""
    size = options.batch

    def read(number: int) -> tuple[Tensor, Tensor]:
        index = sample_order(seed, len(split), number * size, size)
        images, labels = split.images(index), split.labels[index]
        return (images.pin_memory(), labels.pin_memory()) if pin else (images, labels)

    with ThreadPoolExecutor(1) as reader:
        numbers = range(steps * options.accumulate, options.steps * options.accumulate)
        ahead = [reader.submit(read, number) for number in numbers[:1]]
        for number in numbers:
            if number + 1 in numbers:
                ahead.append(reader.submit(read, number + 1))
            yield ahead.pop(0).result()


def _finished(out: Path, identity: str) -> Finetuned | None:
    """What a finished fine-tuning left; None where there is none, or a file is damaged."""
    head = out / "head.safetensors"
    try:
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        finished = Finetuned(
            vector=tf.TaskVector.load(out / "vector.safetensors"),
            head=load_file(head) if head.exists() else None,
            **result["figures"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    _check_identity(out, result["identity"], identity)
    return finished


def _restore(trainee: Trainee, file: Path, identity: str) -> tuple[list[float], int]:
    """Go back to a checkpoint if there is one: seconds of the steps so far, peak of memory."""
    try:
        state: dict[str, Any] = torch.load(file, map_location=trainee.device, weights_only=True)
    except FileNotFoundError:
        return [], 0
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # damaged: from the beginning
        return [], 0
    _check_identity(file, state["identity"], identity)
    trainee.restore(state, len(state["seconds"]))
    return state["seconds"], state["peak"]


def _check_identity(path: Path, got: str, expected: str) -> None:
    if got != expected:
        raise ValueError(
            f"finetune: {path} is of {got}, expected {expected}; give another folder, or delete it"
        )
