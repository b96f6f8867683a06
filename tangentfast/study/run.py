"""A study from its configuration to its report, in stages that go on where they stopped."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .config import Config, HeadKind
from .data import EMBEDDED, prepare
from .experiments import Experiments, base_accuracy
from .files import write_json, write_text
from .parts import Parts, check
from .regimes import REGIMES
from .report import show, write
from .tuning import Tuning, Tunings

__all__ = ["STAGES", "Stage", "run"]

Stage = Literal["prepare", "finetune", "evaluate", "report", "run"]
STAGES: tuple[Stage, ...] = ("prepare", "finetune", "evaluate", "report", "run")


def run(
    config: Config, stage: Stage = "run", *, command: str = "", console: Console | None = None
) -> None:
    """Do one stage of a study, or all; what is done already is not done again.

    Everything goes into the folder `config.out`: config.toml, logs, vectors, a cache by content,
    results.json, and the report. Evaluating fine-tunes what is missing; only preparing downloads
    data sets.

    Args:
        config: as `config.load` gives it.
        stage: one of `STAGES`.
        command: what the results name as the command that made them.
        console: where progress is shown; standard error by default.

    Raises:
        ConfigError: the configuration cannot be run as it is.
        AssetError, DataError: weights or images are not to be had; the message says what to do.
        DivergedError, FloatingPointError: training or a merge gave numbers that are not finite.
        OSError: a file cannot be written; none is left half-written.
    """
    console = console or Console(stderr=True)
    if stage == "report":
        return _report(config, console)
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    parts = Parts(config)
    with _timed(config.out):
        if stage in ("prepare", "run"):
            _prepare(parts, console)
        if stage == "prepare":
            return None
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeRemainingColumn(), TextColumn("{task.fields[speed]}")),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            tunings = Tunings(parts, progress)
            tunings.complete()
            measured = _evaluate(parts, tunings, progress) if stage != "finetune" else {}
    if stage != "finetune":
        seconds = float((config.out / "seconds").read_text())
        write_json(config.out / "results.json", _about(parts, command, seconds) | measured)
    if stage == "run":
        _report(config, console)
    return None


def _prepare(parts: Parts, console: Console) -> None:
    for name in parts.names:
        if name not in EMBEDDED:
            prepare(name, image_size=parts.encoder.image_size, root=parts.root)
        task = parts.task(name)
        images = f"{len(task.train)} + {len(task.val)} + {len(task.test)} images"
        console.print(f"{name}: {len(task.classes)} classes, {images}, {task.source}")


def _evaluate(parts: Parts, tunings: Tunings, progress: Progress) -> dict[str, Any]:
    """The measured part of results.json."""
    config = parts.config
    regimes: dict[str, Any] = {}
    study: list[dict[str, Any]] = []
    total = len(config.train.regimes) * len(config.train.seeds)
    progress_bar = progress.add_task("evaluation", total=total, speed="")
    for regime in config.train.regimes:
        entry = regimes[regime] = _cost(regime, tunings)
        for seed in config.train.seeds:
            progress.update(progress_bar, description=f"evaluation, {regime}, seed {seed}")
            rows = tunings.headline(regime, seed)
            first = seed == config.train.seeds[0]
            measured, maps = _measured(parts, tunings, regime, rows, first)
            entry["runs"].append({"seed": seed} | measured)
            study += [{"regime": regime} | head_map for head_map in maps]
            progress.advance(progress_bar)
    base = {name: base_accuracy(parts, name) for name in config.data.tasks}
    return {"base": base, "regimes": regimes, "head_study": study}


def _cost(regime: str, tunings: Tunings) -> dict[str, Any]:
    """What a regime's training took: the median step of all tasks and seeds, the highest peak.

    Of a regime that takes another's vectors, the rate of those alone.
    """
    train, vectors_of = tunings.parts.config.train, REGIMES[regime].vectors_of
    lr, grid = tunings.chosen_lr(vectors_of or regime)
    entry = {
        "label": REGIMES[regime].label,
        "lr": lr,
        "lr_grid": {f"{rate:g}": accuracy for rate, accuracy in grid.items()},
        "lr_at_edge": len(grid) > 1 and lr in (min(grid), max(grid)),
        "runs": [],
    }
    if vectors_of:
        return entry
    rows = [row for seed in train.seeds for row in tunings.headline(regime, seed)]
    summaries = [tunings.summary(row) for row in rows]
    return entry | {
        "trained_parameters": summaries[0]["trained_parameters"],
        "seconds_per_step": median(f["seconds_per_step"] for f in summaries),
        "samples_per_second": median(f["samples_per_second"] for f in summaries),
        "peak_bytes": max(f["peak_bytes"] for f in summaries),
    }


def _measured(
    parts: Parts, tunings: Tunings, regime: str, rows: Sequence[Tuning], first: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One entry of ``runs``, and those of ``head_study`` if the seed is the first."""
    config = parts.config
    every = _experiments(parts, tunings, regime, rows)
    added = every.addition()
    measured = {"single": added["single"], "addition": added["addition"]}
    if config.data.control:
        measured["negation"] = every.negation(config.data.control)
    measured["cosine"] = every.cosine()
    if first and config.evaluate.subsets and len(rows) > 1:
        measured["subsets"] = every.subsets(added["addition"]["alpha"])
    measured["disentanglement"], study = [], []
    by_name = {row.task: row for row in rows}
    for number, pair in enumerate(config.pairs):
        kinds = config.evaluate.head_study if first and not number else []
        maps, more = _maps(every.only(pair), tunings, [by_name[name] for name in pair], kinds)
        measured["disentanglement"] += maps
        study += more
    return measured, study


def _maps(
    two: Experiments,
    tunings: Tunings,
    pair: Sequence[Tuning],
    kinds: Sequence[HeadKind | Literal["trained"]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """ξ of two tasks: under the study's own head, then under each of `kinds` (Jin et al. 2024).

    Both lists have that of the representation, unless `kinds` is empty.
    """
    own = "trained" if two.config.head.train else two.config.head.kind
    heads: dict[str, Sequence[nn.Module]] = {own: two.heads}
    for kind in kinds:
        if kind != own and kind != "trained":
            heads[kind] = [two.parts.head(row.task, kind) for row in pair]
    maps = two.disentanglement(heads)
    bare = [one for one in maps if one["kind"] == "representation"]
    by_head = {one["head"]: one for one in maps}
    if "trained" in kinds and own != "trained":
        # Encoder and head fine-tuned together: other task vectors, at the rate of the headline.
        pair = [replace(row, train_head=True) for row in pair]
        both = _experiments(two.parts, tunings, two.regime, pair)
        by_head["trained"] = both.disentanglement({"trained": both.heads})[0]
    study = [by_head[kind] for kind in kinds]
    return [by_head[own], *bare], [*study, *bare] if kinds else []


def _experiments(
    parts: Parts, tunings: Tunings, regime: str, rows: Sequence[Tuning]
) -> Experiments:
    vectors, heads = [tunings.vector(row) for row in rows], [tunings.head(row) for row in rows]
    return Experiments(parts, regime, [row.task for row in rows], vectors, heads)


def _about(parts: Parts, command: str, seconds: float) -> dict[str, Any]:
    """What results.json says beside the measurements."""
    config, encoder = parts.config, parts.encoder
    tasks = [parts.task(name) for name in parts.names]
    cuda = torch.device(config.device).type == "cuda"
    device = torch.cuda.get_device_name(config.device) if cuda else config.device
    return {
        "schema": 1,
        "name": config.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "machine": {"cpu": _cpu(), "device": device, "threads": torch.get_num_threads()},
        "config": config.model_dump(mode="json"),
        "command": command,
        "model": {
            "name": encoder.name,
            "library": config.model.library,
            "pretrained": config.model.pretrained,
            "parameters": sum(p.numel() for p in encoder.module.parameters()),
            "image_size": encoder.image_size,
        },
        "head": config.head.kind,
        "tasks": [
            {
                "name": task.name,
                "classes": len(task.classes),
                "train": len(task.train),
                "val": len(task.val),
                "test": len(task.test),
                "source": task.source,
            }
            for task in tasks
        ],
        "control": config.data.control,
        "seeds": config.train.seeds,
    }


def _report(config: Config, console: Console) -> None:
    pages = write(config.out)
    show(json.loads((config.out / "results.json").read_text(encoding="utf-8")))
    console.print(f"report: {pages[0]}")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("tangentfast", "torch", "timm", "open_clip_torch", "torchvision"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _timed(out: Path) -> Iterator[None]:
    """Add the seconds of a block, interrupted or not, to those spent on this folder so far."""
    began = time.perf_counter()
    try:
        yield
    finally:
        file = out / "seconds"
        before = float(file.read_text()) if file.exists() else 0.0
        write_text(file, str(before + time.perf_counter() - began))
