"""A merge shown to people: the table of accuracies, and the plot of accuracy over alpha."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["plot", "show"]


def show(figures: Mapping[str, Any]) -> None:
    """Print the test accuracies of `figures["test_accuracy"]` in percent: tasks × models."""
    from rich.console import Console
    from rich.table import Table

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
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

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
