"""What a study does, as one checked value: read from a TOML file or a preset, with overrides."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomlkit
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
)
from pydantic_core import ErrorDetails
from tomlkit.exceptions import TOMLKitError

__all__ = ["LIBRARIES", "PRESETS", "Config", "ConfigError", "Grid", "load"]

LIBRARIES = ("open_clip", "timm", "dinov2-wheel", "module")
PRESETS = ("small", "clip", "demo")

RegimeName = Literal["nonlinear", "posthoc", "ntk", "attention", "attention-tangent"]
HeadKind = Literal["zero-shot", "prototype", "probe"]
Unit = Annotated[float, Field(ge=0, le=1)]
File = Annotated[Path, Field(strict=False)]  # TOML has no paths, and no tuples


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""


def _shape(value: object) -> str:
    return "table" if isinstance(value, Mapping) else "list" if _is_list(value) else "number"


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class Section(BaseModel):
    """A table of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The pre-trained encoder θ0.

    Attributes:
        library: where it is from; ``"module"`` for any network, through an adapter.
        name: the library's name of it; of an adapter ``"package.module:function"``.
        pretrained: the library's tag of weights, or a checkpoint file.
        image_size: pixels; the network's own by default.
    """

    library: Literal["open_clip", "timm", "dinov2-wheel", "module"] = "open_clip"
    name: str = Field(min_length=1)
    pretrained: str | None = None
    image_size: PositiveInt | None = None


class Head(Section):
    """Features to logits.

    Attributes:
        kind: from the text tower, from class means, or a linear probe.
        train: train it with the encoder; it is frozen otherwise.
    """

    kind: HeadKind = "zero-shot"
    train: bool = False


class Data(Section):
    """The tasks.

    Attributes:
        tasks: those that are fine-tuned on and merged.
        control: the one that forgetting should leave alone; none: no negation.
        root: where prepared data sets are; the package's cache by default.
        sizes: at most so many images to train on, choose on and report on; all by default.
        seed: of splits and of generated images.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    control: str | None = None
    root: File | None = None
    sizes: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)] | None = (
        None
    )
    seed: NonNegativeInt = 0


Steps = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[dict[str, PositiveInt], Tag("table")],
    Discriminator(_shape),
]
Epochs = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[dict[str, PositiveFloat], Tag("table")],
    Discriminator(_shape),
]


class Train(Section):
    """Fine-tuning; the defaults are the papers', where they agree.

    Attributes:
        regimes: of `regimes.REGIMES`.
        seeds: one fine-tuning of each task for each; they order the images.
        steps: optimizer steps, a number or one for each task. Either this or `epochs`.
        epochs: passes over the training images, likewise.
        batch: images that are processed at once.
        accumulate: batches to a step.
        lr: the grid of peak learning rates; with several, each regime takes the one with the best
            mean validation accuracy over `lr_tasks` with the first seed.
        lr_tasks: the tasks that it is chosen on; all by default.
        weight_decay: AdamW's, decoupled.
        decay: what is pulled to zero: τ, or θ = θ0 + τ, as in the papers' code.
        warmup: steps of linear warm-up; at most half of all are.
        clip: the largest gradient norm.
        label_smoothing: of the cross-entropy.
        precision: of θ0 and activations in training; τ and the optimizer stay in float32.
        checkpoint: seconds between checkpoints.
    """

    regimes: Annotated[list[RegimeName], Field(min_length=1)] = list(get_args(RegimeName))
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    steps: Steps | None = None
    epochs: Epochs | None = None
    batch: PositiveInt = 128
    accumulate: PositiveInt = 1
    lr: Annotated[list[PositiveFloat], Field(min_length=1)] = [1e-5]
    lr_tasks: Annotated[list[str], Field(min_length=1)] | None = None
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["tau", "theta"] = "theta"
    warmup: NonNegativeInt = 500
    clip: PositiveFloat = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint: PositiveFloat = 120.0


class Grid(Section):
    """`count` evenly spaced values from `low` to `high`, both included."""

    count: Annotated[int, Field(ge=2)] = 21
    low: float = -2.0
    high: float = 2.0

    def values(self) -> list[float]:
        """The values, rounded to twelve digits so that 0.1 is 0.1."""
        step = (self.high - self.low) / (self.count - 1)
        return [round(self.low + i * step, 12) for i in range(self.count)]


Alphas = Annotated[
    Annotated[Annotated[int, Field(ge=2)], Tag("number")]
    | Annotated[Annotated[list[NonNegativeFloat], Field(min_length=1)], Tag("list")],
    Discriminator(_shape),
]
Pairs = Annotated[
    Annotated[NonNegativeInt, Tag("number")]
    | Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Tag("list")],
    Discriminator(_shape),
]


class Evaluate(Section):
    """Evaluation.

    Attributes:
        batch: images that are processed at once.
        alphas: how many from 0 to 1, or the list.
        xi: the grid of (α1, α2) of the disentanglement error.
        pairs: its pairs of tasks, or how many: the first two tasks, the next two, and so on.
        xi_images: test images of each task that it is taken over; all by default.
        threshold: the share of θ0's accuracy on the control task that negation must leave.
        subsets: the largest number of subsets of tasks to merge, with the first seed; all of them
            if there are no more.
        head_study: heads that ξ is compared with, on the first pair and with the first seed:
            kinds, and ``"trained"``. The representation's is always there beside them.
    """

    batch: PositiveInt = 128
    alphas: Alphas = 21
    xi: Grid = Grid()
    pairs: Pairs = 1
    xi_images: PositiveInt | None = None
    threshold: Unit = 0.95
    subsets: NonNegativeInt = 0
    head_study: list[Literal["zero-shot", "prototype", "probe", "trained"]] = []


class Config(Section):
    """A whole study.

    Attributes:
        name: the run's, in tables and titles.
        out: its folder.
        device: as torch names it.
        threads: of the CPU; torch's choice by default.
    """

    name: str = "study"
    out: File = Path("study")
    device: str = "cpu"
    threads: PositiveInt | None = None
    model: Model
    head: Head = Head()
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @property
    def alphas(self) -> list[float]:
        """The grid of merging coefficients."""
        alphas = self.evaluate.alphas
        return Grid(count=alphas, low=0, high=1).values() if isinstance(alphas, int) else alphas

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of tasks of the disentanglement error."""
        pairs, tasks = self.evaluate.pairs, self.data.tasks
        if isinstance(pairs, int):
            return list(itertools.islice(zip(tasks[::2], tasks[1::2], strict=False), pairs))
        return [(a, b) for a, b in pairs]

    def steps(self, task: str, images: int) -> int:
        """Optimizer steps of a task with so many training images."""
        if self.train.steps is not None:
            steps = self.train.steps
            return steps[task] if isinstance(steps, dict) else steps
        epochs = self.train.epochs
        assert epochs is not None  # `load` asks for one of both
        passes = epochs[task] if isinstance(epochs, dict) else epochs
        return max(1, round(passes * images / (self.train.batch * self.train.accumulate)))

    def toml(self) -> str:
        """As a file that `load` reads back to an equal value."""
        return tomlkit.dumps(self.model_dump(mode="json", exclude_none=True))


def load(
    source: str | Path, overrides: Mapping[str, Any] | None = None, *, preset: bool = False
) -> Config:
    """Read and check a configuration.

    Args:
        source: a TOML file, or with `preset` a name of `PRESETS`.
        overrides: dotted key -> value, such as ``{"train.lr": [1e-4]}``; they win over the file.
        preset: whether `source` is the name of a preset.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or has a bad value. The
            message names the first, with what was expected.
    """
    if preset:
        if source not in PRESETS:
            raise ConfigError(f"preset is {source!r}; expected one of {', '.join(PRESETS)}")
        text = (resources.files(__package__) / "presets" / f"{source}.toml").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {source}: {error}") from error
    try:
        tree: dict[str, Any] = tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise ConfigError(f"{source} is no TOML: {error}") from error
    for key, value in (overrides or {}).items():
        _put(tree, key, value)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_message(error)) from error
    for key, problem in _problems(config):
        raise ConfigError(f"{key} {problem}")
    return config


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key} is no key: {name} is a value; name an existing table")
    tree[last] = value


def _problems(config: Config) -> Iterator[tuple[str, str]]:
    """What one key's own type cannot say: (key, what is wrong with it)."""
    data, train, evaluate = config.data, config.train, config.evaluate
    lists: dict[str, Sequence[object]] = {
        "data.tasks": data.tasks,
        "train.regimes": train.regimes,
        "train.seeds": train.seeds,
        "train.lr": train.lr,
        "train.lr_tasks": train.lr_tasks or (),
        "evaluate.head_study": evaluate.head_study,
    }
    for key, values in lists.items():
        if twice := [v for i, v in enumerate(values) if v in values[:i]]:
            yield key, f"has {twice[0]!r} twice; expected different ones"
    for i, name in enumerate(train.lr_tasks or ()):
        if name not in data.tasks:
            yield f"train.lr_tasks[{i}]", f"is {name!r}; expected one of data.tasks"
    if data.control in data.tasks:
        yield "data.control", f"is {data.control!r}; expected a task that is not in data.tasks"
    if (train.steps is None) == (train.epochs is None):
        got = "both are given" if train.steps is not None else "neither is given"
        yield "train.steps", f"or train.epochs: {got}; expected one of them"
    for key, table in (("train.steps", train.steps), ("train.epochs", train.epochs)):
        if isinstance(table, dict) and (missing := [t for t in data.tasks if t not in table]):
            yield f"{key}.{missing[0]}", "is missing; expected a number for each of data.tasks"
    if evaluate.xi.low >= evaluate.xi.high:
        yield "evaluate.xi.low", f"is {evaluate.xi.low}; expected less than high"
    if isinstance(evaluate.alphas, list) and sorted(set(evaluate.alphas)) != evaluate.alphas:
        yield "evaluate.alphas", f"is {evaluate.alphas}; expected increasing numbers"
    for i, pair in enumerate(evaluate.pairs if isinstance(evaluate.pairs, list) else ()):
        if pair[0] == pair[1] or not set(pair) <= set(data.tasks):
            yield f"evaluate.pairs[{i}]", f"is {pair}; expected two different ones of data.tasks"
    texts: dict[str, Sequence[str]] = {
        "head.kind": [config.head.kind],
        "evaluate.head_study": evaluate.head_study,
    }
    if config.model.library in ("timm", "dinov2-wheel"):
        for key, kinds in texts.items():
            if "zero-shot" in kinds:
                yield (
                    key,
                    (
                        f'asks for "zero-shot", but models of {config.model.library} have no text '
                        'tower; expected "prototype" or "probe"'
                    ),
                )


def _message(error: ValidationError) -> str:
    """The first thing that is wrong, and how many more there are."""
    first, *more = error.errors()
    rest = f" (and {len(more)} more: {', '.join(map(_key, more))})" if more else ""
    key, got = _key(first), first["input"]
    if first["type"] == "missing":
        return f"{key} is missing; expected it in the configuration{rest}"
    if first["type"] == "extra_forbidden":
        return f"{key} is no known key; {_close(first)}{rest}"
    expected = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be "))
    return f"{key} is {got!r}; expected {expected.format(**first.get('ctx', {}))}{rest}"


# pydantic's kinds of errors, in words that go after "expected".
_EXPECTED = {
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a name",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "literal_error": "{expected}",
}


def _key(error: ErrorDetails) -> str:
    """``train.lr[1]``; without the tags by which a union is told apart."""
    parts = [p for p in error["loc"] if p not in ("number", "list", "table")]
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return dotted.removeprefix(".")


def _close(error: ErrorDetails) -> str:
    section: type[BaseModel] = Config
    for part in error["loc"][:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        section = annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
