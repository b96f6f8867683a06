"""What a study is made of, each part made when it is first asked for: encoder, tasks, heads."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from .assets import cache_folder
from .cache import Cache, digest
from .config import Config, ConfigError, HeadKind
from .data import Split, Task, check_name, load_task
from .encoders import Encoder, load_encoder
from .files import write_text
from .heads import build_head

__all__ = ["Parts", "check"]

SAMPLED = 256  # images of a split that stand for its pixels in keys of the cache


def check(config: Config) -> None:
    """Refuse what can be told before any work: names of tasks, the device, the folder.

    Writes the configuration, as resolved, into the run's folder.

    Raises:
        ConfigError: a key has a value that cannot be used here.
    """
    names = {f"data.tasks[{i}]": name for i, name in enumerate(config.data.tasks)}
    if config.data.control:
        names["data.control"] = config.data.control
    for key, name in names.items():
        try:
            check_name(name)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'device is {config.device!r}; expected one that torch has here, such as "cpu" '
            f"({str(error).splitlines()[0]})"
        ) from error
    try:
        write_text(config.out / "config.toml", config.toml())
    except OSError as error:
        raise ConfigError(f"out is {config.out}; expected a folder to write to: {error}") from error


class Parts:
    """Encoder, tasks and heads of a configuration, on its device, and the cache of its run.

    What a configuration names and is not to be had raises a `ConfigError` with the key, or the
    error of the room that it comes from (`AssetError`, `DataError`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = Cache(config.out / "cache")
        self.root = config.data.root or cache_folder() / "data"
        self._tasks: dict[str, Task] = {}
        self._heads: dict[tuple[str, HeadKind], nn.Module] = {}
        self._digests: dict[str, str] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """θ0."""
        model = self.config.model
        torch.manual_seed(0)  # weights that are not pre-trained are the same in every run
        try:
            encoder = load_encoder(model.library, model.name, model.pretrained, model.image_size)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
        kinds = [self.config.head.kind, *self.config.evaluate.head_study]
        if "zero-shot" in kinds and encoder.text is None:
            key = "head.kind" if kinds[0] == "zero-shot" else "evaluate.head_study"
            raise ConfigError(
                f'{key} asks for "zero-shot", but {encoder.name} has no text tower; expected '
                '"prototype" or "probe"'
            )
        encoder.module.to(self.config.device).eval()
        return encoder

    @property
    def names(self) -> list[str]:
        """All tasks, the control last."""
        data = self.config.data
        return [*data.tasks, data.control] if data.control else list(data.tasks)

    def task(self, name: str) -> Task:
        """A task by name."""
        if name not in self._tasks:
            data, size = self.config.data, self.encoder.image_size
            try:
                self._tasks[name] = load_task(
                    name, image_size=size, seed=data.seed, sizes=data.sizes, root=self.root
                )
            except ValueError as error:
                raise ConfigError(f"data: {error}") from error
        return self._tasks[name]

    def head(self, name: str, kind: HeadKind | None = None) -> nn.Module:
        """A task's frozen head on θ0, of the study's kind by default."""
        kind = kind or self.config.head.kind
        if (name, kind) not in self._heads:
            device, batch = self.config.device, self.config.evaluate.batch
            task = self.task(name)
            try:
                head = build_head(kind, self.encoder, task, device=device, batch=batch)
            except ValueError as error:
                raise ConfigError(f"head.kind: {error}") from error
            self._heads[name, kind] = head.to(device).eval()
        return self._heads[name, kind]

    @cached_property
    def base(self) -> str:
        """Digest of θ0 and of what its inputs are."""
        encoder = self.encoder
        return digest(encoder.module, encoder.image_size, encoder.mean, encoder.std)

    def data(self, name: str) -> str:
        """Digest of a task: all labels, and a sample of the images of each split."""
        if name not in self._digests:
            task = self.task(name)
            splits = [_sample(split) for split in (task.train, task.val, task.test)]
            self._digests[name] = digest(task.name, task.classes, splits)
        return self._digests[name]


def _sample(split: Split) -> list[torch.Tensor]:
    count = min(len(split), SAMPLED)
    return [split.labels, split.images(torch.arange(count) * len(split) // max(count, 1))]
