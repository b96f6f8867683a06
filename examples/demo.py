"""Task arithmetic in tangent space: a real pretrained ViT, three tasks, one merged model.

    python examples/demo.py --out demo-output

A DINOv2 ViT-S/14 is linearized around its pretrained weights θ0 and fine-tuned on each task by
itself: f(x; θ0) + J(x) τ, with τ the task vector (Ortiz-Jimenez et al. 2023, arXiv:2305.12827),
trained for the attention's linear layers only (Jin et al. 2024, arXiv:2407.07089). Then the task
vectors are added up. Training sees the training split, α is chosen on the validation split, and
the table reports the test split. The first run downloads 93 MB.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # no pyplot: no global state and no display
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import tangentfast as tf
from tangentfast.study.assets import AssetError, dinov2_vit_small
from tangentfast.study.prototypes import PrototypeHead
from tangentfast.study.tasks import Split, Task, load_tasks, normalize

ALPHAS = [i / 20 for i in range(25)]  # 0, the base network, to 1.2


def batches(split: Split, size: int = 50) -> Iterator[Tensor]:
    return map(normalize, split.images.split(size))


def accuracy(head: PrototypeHead, features: Tensor, split: Split) -> float:
    return (head(features).argmax(-1) == split.labels).float().mean().item()


@torch.no_grad()
def features(encoder: nn.Module, split: Split) -> Tensor:
    return torch.cat([encoder(images) for images in batches(split)])


def fine_tune(
    encoder: nn.Module, head: PrototypeHead, task: Task, *, steps: int, batch: int, lr: float,
    seed: int,
) -> tf.TaskVector:  # fmt: skip
    """Train τ on `task`; the encoder's own weights θ0 stay what they are, and so does the head."""
    lin = tf.linearize(encoder, params="attention")
    optimizer = torch.optim.AdamW(lin.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    images, labels = task.train
    epochs = [
        torch.randperm(len(labels), generator=generator)
        for _ in range(1 + steps * batch // len(labels))
    ]
    order = torch.cat(epochs)[: steps * batch].split(batch)
    for chosen in track(order, description=f"fine-tuning on {task.name:<8}"):
        loss = F.cross_entropy(head(lin(normalize(images[chosen]))), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lin.task_vector()


@torch.no_grad()
def tangents(
    encoder: nn.Module, vectors: Sequence[tf.TaskVector], split: Split
) -> tuple[Tensor, Tensor]:
    """f(x; θ0) [N, D] and every J(x) τ_k [K, N, D]: all that any mixture of the vectors needs."""
    outs, douts = [], []
    for images in batches(split):
        out, tangents = tf.jvp(encoder, (images,), params=vectors)
        outs.append(out)
        douts.append(torch.stack(tangents))
    return torch.cat(outs), torch.cat(douts, dim=1)


def run(
    encoder: nn.Module, tasks: Sequence[Task], out: Path, *, steps: int = 50, batch: int = 32,
    lr: float = 5e-5, seed: int = 0,
) -> dict:  # fmt: skip
    """The whole way; returns the figures, and writes them, the task vectors and a plot to `out`."""
    start = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    heads = [PrototypeHead(features(encoder, task.train), task.train.labels) for task in tasks]
    lap("heads")

    for head, task in zip(heads, tasks, strict=True):
        tv = fine_tune(encoder, head, task, steps=steps, batch=batch, lr=lr, seed=seed)
        tv.save(out / f"{task.name}.safetensors")
    lap("fine-tuning")

    # From here on the task vectors are all that is left of the training.
    vectors = [tf.TaskVector.load(out / f"{task.name}.safetensors") for task in tasks]
    curves: dict[str, list[list[float]]] = {"val": [], "test": []}  # [task][alpha]
    alone = []
    for k, (head, task) in enumerate(zip(heads, tasks, strict=True)):
        for part, curve in curves.items():
            split = getattr(task, part)
            y, dy = tangents(encoder, vectors, split)  # one pass, whatever the number of alphas
            curve.append([accuracy(head, y + alpha * dy.sum(0), split) for alpha in ALPHAS])
        alone.append(accuracy(head, y + dy[k], task.test))
    means = {part: torch.tensor(curve).mean(0).tolist() for part, curve in curves.items()}
    best = means["val"].index(max(means["val"]))
    lap("alpha sweep")

    merged = copy.deepcopy(encoder)
    tf.merge_(merged, vectors, ALPHAS[best])
    lap("merge")
    ordinary = [
        accuracy(head, features(merged, task.test), task.test)
        for head, task in zip(heads, tasks, strict=True)
    ]
    lap("merged network")

    figures = {
        "tasks": [task.name for task in tasks],
        "test_accuracy": {
            "base": [curve[0] for curve in curves["test"]],
            "fine_tuned_tangent": alone,
            "merged_tangent": [curve[best] for curve in curves["test"]],
            "merged_ordinary": ordinary,
        },
        "alpha": ALPHAS[best],
        "alphas": ALPHAS,
        "accuracy_over_alpha": curves,
        "gram": tf.gram(vectors).tolist(),
        "settings": {"steps": steps, "batch": batch, "lr": lr, "seed": seed},
        "seconds": seconds,
        "versions": {name: version(name) for name in ("torch", "timm", "tangentfast")}
        | {"python": platform.python_version(), "threads": torch.get_num_threads()},
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot(figures, out / "accuracy-over-alpha.png")
    return figures


def show(figures: Mapping[str, Any]) -> None:
    """Print the test accuracies of `figures["test_accuracy"]` in percent: tasks × models."""
    headings = {
        "base": "base network",
        "fine_tuned_tangent": "fine-tuned in tangent\nspace, one model a task",
        "merged_tangent": f"merged in tangent space\nalpha = {figures['alpha']:.2f}, one model",
        "merged_ordinary": "ordinary network after\nmerge_, the same alpha",
    }
    table = Table("task", title="test accuracy, %")
    columns = []
    for name, heading in headings.items():
        table.add_column(heading, justify="right")
        accuracies = figures["test_accuracy"][name]
        columns.append([*accuracies, sum(accuracies) / len(accuracies)])
    for task, *row in zip([*figures["tasks"], "mean"], *columns, strict=True):
        last = task == figures["tasks"][-1]
        table.add_row(task, *(f"{100 * value:.1f}" for value in row), end_section=last)
    Console().print(table)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draw test accuracy over α for each task, and the validation mean that chose α, as PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curves = figures["accuracy_over_alpha"]
    for task, curve in zip(figures["tasks"], curves["test"], strict=True):
        axes.plot(figures["alphas"], curve, label=f"{task}, test")
    mean = torch.tensor(curves["val"]).mean(0)
    axes.plot(figures["alphas"], mean, "k--", label="mean, validation")
    axes.axvline(figures["alpha"], color="grey", linewidth=0.8)
    axes.set(xlabel=r"$\alpha$", ylabel="accuracy")
    axes.set_title(r"$f(x; \theta_0) + \alpha\, J(x) \sum_k \tau_k$")
    axes.legend()
    figure.savefig(path, dpi=120, backend="agg")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--source", choices=("wheel", "hub"), default="wheel", help="of the ViT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        encoder = dinov2_vit_small(source=options.source)
        tasks = load_tasks(seed=options.seed)
    except AssetError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    show(run(encoder, tasks, options.out, seed=options.seed))
    print(f"{time.perf_counter() - start:.0f} s; figures, plot and task vectors in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
