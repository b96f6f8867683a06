"""results.json as objects: what a run measured, checked before anything is drawn from it.

Accuracies are fractions, times are seconds, memory is bytes. A number that could not be measured is
null or NaN in the file and NaN here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

__all__ = ["Map", "Regime", "Results", "ResultsError", "Trial", "load"]

SHOWN = 5  # errors of one file that are shown at once


class ResultsError(ValueError):
    """A results.json that no report can be made of; the message names file, key and remedy."""


Number = Annotated[float, BeforeValidator(lambda x: math.nan if x is None else x)]
Curve = list[Number]
Matrix = list[list[Number]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Addition(_Part):
    """θ0 + α Σ τ_t: validation accuracy of every task over α, and test at the α it chose."""

    alphas: list[float] = Field(min_length=1)
    val: dict[str, Curve]
    val_single: dict[str, Number] = {}
    test: dict[str, Number]
    alpha: Number
    absolute: Number
    normalized: Number
    at_one: Number = math.nan

    @model_validator(mode="after")
    def _lengths(self) -> Addition:
        for task, curve in self.val.items():
            if len(curve) != len(self.alphas):
                raise ValueError(
                    f"val.{task} has {len(curve)} values, alphas has {len(self.alphas)}"
                )
        return self


class Negated(_Part):
    """θ0 − α τ of one task."""

    alpha: Number
    target: Number
    control: Number
    reached: bool = True


class Negation(_Part):
    """Every task negated, at the least target accuracy that leaves the control `threshold`."""

    tasks: dict[str, Negated]
    target: Number
    control: Number
    control_base: Number = math.nan
    threshold: float = 0.95


class Map(_Part):
    """ξ(α1 = alphas[i], α2 = alphas[j]) of two tasks, and its mean over the box [0, 1]²."""

    tasks: list[str] = Field(min_length=2, max_length=2)
    kind: str = "prediction"
    head: str = ""
    alphas: list[float] = Field(min_length=1)
    xi: Matrix
    box: Number

    @model_validator(mode="after")
    def _square(self) -> Map:
        expected = [len(self.alphas)] * len(self.alphas)
        if [len(row) for row in self.xi] != expected:
            raise ValueError(
                f"xi has rows of {[len(row) for row in self.xi]} values, expected {expected}"
            )
        return self


class HeadMap(Map):
    """A map of the head study: one regime under one head, or of the representation itself."""

    regime: str


class Subset(_Part):
    """The merge of some of the tasks."""

    tasks: list[str]
    alpha: Number = math.nan
    absolute: Number
    normalized: Number


class Trial(_Part):
    """One regime with one seed."""

    seed: int
    single: dict[str, Number]
    addition: Addition | None = None
    negation: Negation | None = None
    disentanglement: list[Map] = []
    cosine: Matrix | None = None
    subsets: list[Subset] = []


class Regime(_Part):
    """One regime: what was trained at which cost, and a trial for every seed."""

    label: str
    lr: float | None = None
    lr_grid: dict[str, Number] = {}
    trained_parameters: int | None = None
    seconds_per_step: Number = math.nan
    peak_bytes: int | None = None
    trials: list[Trial] = Field(alias="runs")


class Task(_Part):
    """A data set: numbers of classes and of images, and whether the images are real."""

    name: str
    classes: int
    train: int
    val: int
    test: int
    source: str


class Model(_Part):
    """The encoder."""

    name: str
    library: str = ""
    pretrained: str | None = None
    parameters: int | None = None
    image_size: int | None = None


class Results(_Part):
    """One run folder's results.json."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    version: int = Field(alias="schema")
    name: str
    date: str = ""
    seconds: Number = math.nan
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    config: dict[str, Any] = {}
    command: str = ""
    model: Model
    head: str
    all_tasks: list[Task] = Field(alias="tasks", min_length=1)
    control: str | None = None
    seeds: list[int]
    base: dict[str, Number]
    regimes: dict[str, Regime]
    head_study: list[HeadMap] = []

    @model_validator(mode="after")
    def _consistent(self) -> Results:
        if self.version != 1:
            raise ValueError(f"schema is {self.version}, this version of tangentfast reads 1")
        known = {task.name for task in self.all_tasks}
        for name, regime in self.regimes.items():
            for i, trial in enumerate(regime.trials):
                where = f"regimes.{name}.runs[{i}]"
                if trial.seed not in self.seeds:
                    raise ValueError(f"{where}.seed is {trial.seed}, seeds are {self.seeds}")
                added = trial.addition
                for part in (trial.single, *((added.val, added.test) if added else ())):
                    if unknown := set(part) - known:
                        raise ValueError(f"{where} has the unknown tasks {sorted(unknown)}")
                size = len(self.tasks)
                if trial.cosine is not None and [len(r) for r in trial.cosine] != [size] * size:
                    raise ValueError(f"{where}.cosine is not {size} × {size}, one row a task")
        return self

    @property
    def tasks(self) -> list[Task]:
        """The tasks that were fine-tuned on: all but the control."""
        return [task for task in self.all_tasks if task.name != self.control]


def _place(location: Sequence[int | str]) -> str:
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return place.lstrip(".")


def load(source: Path | Mapping[str, Any]) -> Results:
    """Read and check a results.json, or what it holds.

    Args:
        source: The file, the run folder it lies in, or its content.

    Raises:
        ResultsError: No such file, not JSON, a key missing or of the wrong kind.
    """
    where = "results"
    if isinstance(source, Path):
        file = source / "results.json" if source.is_dir() else source
        where = str(file)
        try:
            source = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(
                f"{where}: {error.strerror}; expected the folder of a run, "
                "which `tangentfast study run` makes"
            ) from None
        except ValueError as error:
            raise ResultsError(f"{where}: is not JSON: {error}; run the study anew") from None
    try:
        return Results.model_validate(source)
    except ValidationError as error:
        lines = []
        for problem in error.errors()[:SHOWN]:
            place = _place(problem["loc"])
            if problem["type"] == "missing":
                lines.append(f"{place} is missing")
            elif problem["type"] == "value_error":
                lines.append(f"{place}: {problem['ctx']['error']}".lstrip(": "))
            else:
                value = repr(problem["input"])
                lines.append(f"{place}: {problem['msg']}, got {value[:60]}".lstrip(": "))
        more = error.error_count() - len(lines)
        tail = [f"and {more} more"] if more else []
        raise ResultsError(
            f"{where}: "
            + "; ".join([*lines, *tail])
            + "; `tangentfast study evaluate` writes it anew"
        ) from None
