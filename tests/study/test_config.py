"""tangentfast.study.config: presets, overrides, and one message that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("tomlkit")

from tangentfast.study.config import PRESETS, Config, ConfigError, load
from tangentfast.study.regimes import REGIMES

BASE = '[model]\nname = "x"\n[data]\ntasks = ["a", "b", "c"]\n[train]\nsteps = 5\n'


def config(tmp_path: Path, extra: str = "", **overrides: Any) -> Config:
    file = tmp_path / "study.toml"
    file.write_text(BASE + extra, encoding="utf-8")
    return load(file, {key.replace("__", "."): value for key, value in overrides.items()})


BAD = {
    "lr = [1, -1]": "train.lr[1] is -1; expected a number greater than 0",
    "lr = 0.1": "train.lr is 0.1; expected a list",
    "lr = [nan]": "train.lr[0] is nan; expected a finite number",
    "lr = [1e-4, 1e-4]": "train.lr has 0.0001 twice; expected different ones",
    "lrr = 1": "train.lrr is no known key; did you mean lr?",
    "foo = 1": "train.foo is no known key; expected one of regimes, seeds, steps",
    "batch = true": "train.batch is True; expected a whole number",
    "batch = 2.5": "train.batch is 2.5; expected a whole number",
    "epochs = 1": "train.steps or train.epochs: both are given; expected one of them",
    'regimes = ["ntk", "sgd"]': "train.regimes[1] is 'sgd'; expected 'nonlinear', 'posthoc', 'ntk'",
    "label_smoothing = 1.0": "train.label_smoothing is 1.0; expected a number less than 1",
    'decay = "w"': "train.decay is 'w'; expected 'tau' or 'theta'",
    "seeds = []": "train.seeds is []; expected at least 1 of them",
    "[evaluate]\nalphas = 1": "evaluate.alphas is 1; expected a number of at least 2",
    "[evaluate]\nalphas = [0.5, 0.1]": "evaluate.alphas is [0.5, 0.1]; expected increasing numbers",
    '[evaluate]\npairs = [["a", "z"]]': "evaluate.pairs[0] is ['a', 'z']; expected two different",
    '[evaluate]\npairs = [["a"]]': "evaluate.pairs[0] is ['a']; expected at least 2 of them",
    "[evaluate]\nxi = {low = 3.0}": "evaluate.xi.low is 3.0; expected less than high",
    "[evaluate]\nxi = {count = 9, lo = 1}": "evaluate.xi.lo is no known key; did you mean low?",
    "[evaluate]\nthreshold = 2": "evaluate.threshold is 2; expected a number of at most 1",
    "a = 1\nb = 2": "train.a is no known key; expected one of",
    "a ==": "study.toml is no TOML: ",
}


@pytest.mark.parametrize("extra", BAD, ids=lambda extra: extra.replace("\n", " "))
def test_bad_values_are_named(tmp_path: Path, extra: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, extra)
    assert BAD[extra] in str(caught.value)
    assert "\n" not in str(caught.value)


OVERRIDES: list[tuple[dict[str, Any], str]] = [
    ({"train.steps": {"a": 1}}, "train.steps.b is missing; expected a number for each of"),
    ({"train.steps": {"a": -1, "b": 1, "c": 1}}, "train.steps.a is -1; expected a number greater"),
    ({"train.steps": "many"}, "train.steps is 'many'; expected a whole number"),
    ({"train.steps.a.b": 1}, "train.steps.a.b is no key: steps is a value"),
    ({"data.sizes": [1, 2]}, "data.sizes[2] is missing"),
    ({"data.control": "a"}, "data.control is 'a'; expected a task that is not in data.tasks"),
    ({"model.library": "hf"}, "model.library is 'hf'; expected 'open_clip', 'timm'"),
    ({"model": {}}, "model.name is missing; expected it in the configuration"),
    ({"model.library": "timm"}, 'head.kind asks for "zero-shot", but models of timm have no text'),
    ({"train.lr": [-1], "data.tasks": []}, "(and 1 more: train.lr[0])"),
]


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES)
def test_bad_overrides_are_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **overrides)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="preset is 'big'; expected one of small, clip, demo"):
        load("big", preset=True)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_and_written_back(name: str, tmp_path: Path) -> None:
    preset = load(name, preset=True)
    assert preset.name == name
    file = tmp_path / "config.toml"
    file.write_text(preset.toml(), encoding="utf-8")
    assert load(file) == preset


def test_presets_keep_to_the_protocol() -> None:
    small, clip = load("small", preset=True), load("clip", preset=True)
    assert len(small.data.tasks) >= 8
    assert small.train.regimes == clip.train.regimes == list(REGIMES)
    assert min(len(small.train.seeds), len(small.train.lr)) >= 3
    assert {0.0, 1.0} <= set(small.evaluate.xi.values())  # the corners of the search box
    assert clip.alphas == pytest.approx([i / 20 for i in range(21)], abs=0)
    epochs = {"cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15,
              "sun397": 14, "svhn": 4}  # fmt: skip
    assert clip.train.epochs == epochs
    assert (clip.train.decay, clip.train.weight_decay, clip.train.clip) == ("theta", 0.1, 1.0)
    # 35 epochs of 7,330 images (90 % of 8,144) in batches of 128.
    assert clip.steps("cars", 7330) == 2004


def test_overrides_win_and_types_follow(tmp_path: Path) -> None:
    made = config(tmp_path, train__lr=[1e-3], out="elsewhere", data__sizes=[3, 2, 1])
    assert made.train.lr == [1e-3]
    assert made.out == Path("elsewhere")
    assert made.data.sizes == (3, 2, 1)


def test_pairs_and_steps(tmp_path: Path) -> None:
    assert config(tmp_path).pairs == [("a", "b")]
    assert config(tmp_path, evaluate__pairs=5).pairs == [("a", "b")]
    assert config(tmp_path, evaluate__pairs=0).pairs == []
    assert config(tmp_path, evaluate__pairs=[["c", "a"]]).pairs == [("c", "a")]
    table = config(tmp_path, train__steps={"a": 1, "b": 2, "c": 3})
    assert [table.steps(name, 99) for name in "abc"] == [1, 2, 3]
    passes = config(tmp_path, train={"epochs": 3, "batch": 4, "accumulate": 2})
    assert passes.steps("a", 20) == 8  # 60 images, 8 a step
    assert passes.steps("a", 1) == 1
