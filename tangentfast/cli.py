"""The command `tangentfast`: what is installed, and the study of the papers' experiments."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import tomlkit
    import typer
except ImportError as error:
    sys.exit(
        f"tangentfast: the command needs {error.name}, which is not installed; expected the extra "
        "study: pip install 'tangentfast[study]'"
    )

import tangentfast

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
study = typer.Typer(
    no_args_is_help=True,
    help="The experiments of arXiv:2305.12827 and arXiv:2407.07089 with a model and data of yours.",
)
app.add_typer(study, name="study")

Preset = Annotated[str | None, typer.Option(help="Settings that come along: small, clip or demo.")]
File = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]
Model = Annotated[
    str | None, typer.Option(help="Name of the model; LIBRARY:NAME if not of open_clip.")
]
Pretrained = Annotated[str | None, typer.Option(help="Tag of the weights, or a checkpoint file.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks, with commas.")]
Regimes = Annotated[str | None, typer.Option(help="Regimes, with commas.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds, with commas.")]
Device = Annotated[str | None, typer.Option(help="As torch names it: cpu, cuda, cuda:1.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting: KEY=VALUE, such as train.lr=[1e-5,1e-4]."),
]


@app.command()
def info() -> None:
    """Say what is installed and what runs here."""
    typer.echo(str(tangentfast.info()))


def _stage(stage: str, summary: str) -> None:
    """Add the command of one stage; all take the same options."""

    def command(
        preset: Preset = None,
        config: File = None,
        model: Model = None,
        pretrained: Pretrained = None,
        tasks: Tasks = None,
        regimes: Regimes = None,
        seeds: Seeds = None,
        device: Device = None,
        out: Out = None,
        set_: Set = None,
    ) -> None:
        from tangentfast.study.config import LIBRARIES, ConfigError, load
        from tangentfast.study.run import run

        overrides: dict[str, Any] = {}
        if model is not None:
            library, _, name = model.partition(":")
            known = library in LIBRARIES
            overrides["model.library"] = library if known else "open_clip"
            overrides["model.name"] = name if known else model
        given = {
            "model.pretrained": pretrained,
            "data.tasks": tasks and tasks.split(","),
            "train.regimes": regimes and regimes.split(","),
            "train.seeds": seeds and [_value(seed) for seed in seeds.split(",")],
            "device": device,
            "out": out and str(out),
        }
        overrides |= {key: value for key, value in given.items() if value is not None}
        for setting in set_ or ():
            key, equals, value = setting.partition("=")
            if not equals:
                raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as train.batch=64")
            overrides[key.strip()] = _value(value)
        if config is not None and preset is not None:
            raise ConfigError("--config and --preset are both given; expected one of them")
        loaded = load(config or preset or "clip", overrides, preset=config is None)
        again = f"tangentfast study {stage} --config {loaded.out / 'config.toml'}"
        try:
            run(loaded, stage, command=shlex.join(["tangentfast", *sys.argv[1:]]))  # type: ignore[arg-type]
        except KeyboardInterrupt:
            typer.echo(f"study: interrupted; go on with: {again}", err=True)
            raise typer.Exit(130) from None

    command.__doc__ = summary
    study.command(stage)(command)


_stage("prepare", "Fetch weights and data sets and decode them, once.")
_stage("finetune", "Fine-tune on every task in every regime; an interrupted run goes on.")
_stage("evaluate", "Merge and measure; fine-tunes what is missing; writes results.json.")
_stage("report", "Draw tables, figures and report.html from results.json.")
_stage("run", "All of it. Without --config or --preset: the papers' setting (preset clip).")


@study.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Where the comparison goes.")] = Path("comparison"),
) -> None:
    """Set runs side by side, with the published numbers where the data sets are the papers'."""
    from tangentfast.study.report import compare as write

    typer.echo(f"comparison: {write(runs, out)[0]}")


def _value(text: str) -> Any:
    """A TOML value; what is none is a string."""
    try:
        return tomlkit.parse(f"value = {text}").unwrap()["value"]
    except tomlkit.exceptions.TOMLKitError:
        return text


def main() -> None:
    """The command line; what a user can mend ends with one message and no traceback.

    Exit codes: 2 for a bad configuration, 1 for what else failed, 130 for an interrupt.
    """
    # A scheduler's SIGTERM ends a run as Ctrl-C does: with a checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except ImportError as error:
        sys.exit(f"study: {error}; expected the extra study: pip install 'tangentfast[study]'")
    except Exception as error:
        ours = type(error).__module__.startswith("tangentfast")
        if not ours and not isinstance(error, OSError | ValueError | FloatingPointError):
            raise
        typer.echo(f"study: {error}", err=True)
        sys.exit(2 if type(error).__name__ == "ConfigError" else 1)
