"""`make gpu`: build, test and measure on a machine with an NVIDIA GPU, in one go.

    python benchmarks/gpu.py [--rehearse] [STAGE ...]

It needs torch with CUDA, nvcc, and no network. Each stage is a process of its own with a limit of
time, and leaves its log in build/gpu/ and its results even where another fails; those measured are
gathered in benchmarks/results/<gpu>/ and in docs/benchmarks-gpu.md. A short table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and the program without which it is left out."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    @property
    def results(self) -> Path:
        return LOGS / f"{self.name}.json"


def bench(suite: str, seconds: int) -> Stage:
    """One file of benchmarks."""
    name = f"bench-{suite}"
    command = [*PYTEST, f"benchmarks/bench_{suite}.py", "--benchmark-only", "--benchmark-quiet"]
    command += ["-k", "not compiled", f"--benchmark-json={LOGS / name}.json"]
    return Stage(name, command, seconds)


# 9 minutes at most.
STAGES = [
    Stage(
        "build",
        # Not pip, which may want the network. egg_info says the version of what lies here.
        [sys.executable, "setup.py", "-q", "egg_info", "build_ext", "--inplace"],
        125,
        {"TANGENTFAST_CUDA": "1", "TANGENTFAST_NATIVE": "1"},
    ),
    Stage("test", [*PYTEST, "-m", "gpu"], 130),
    Stage(
        "memcheck",
        ["compute-sanitizer", "--error-exitcode", "9", *PYTEST, "-m", "gpu and memcheck"],
        40,
        needs="compute-sanitizer",
    ),
    bench("merge", 25),
    bench("kernels", 60),
    bench("step", 105),
    bench("tangents", 20),
    bench("growth", 20),
    bench("python", 15),
]


def execute(stage: Stage, environment: dict[str, str], patience: int = 1) -> str:
    """The stage's outcome in a few words; what it printed is in its log.

    Its limit of time is multiplied by `patience`.
    """
    if stage.needs and not shutil.which(stage.needs):
        return f"left out: no {stage.needs} here"
    LOGS.mkdir(parents=True, exist_ok=True)
    stage.results.unlink(missing_ok=True)
    own = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    started = time.perf_counter()
    with stage.log.open("w") as log:
        # A session of its own, so that what a stopped stage has started does not disturb the next.
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=own | environment | stage.environment,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=patience * stage.seconds)
            outcome = "ok" if code == 0 else f"FAILED with {code}"
        except subprocess.TimeoutExpired:
            outcome = f"STOPPED after its {patience * stage.seconds} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = stage.log.read_text(errors="replace").strip().splitlines()
    return f"{outcome}, {time.perf_counter() - started:.0f} s; {lines[-1][:100] if lines else ''}"


def gather(stages: list[Stage]) -> dict[str, Any] | None:
    """The results of all stages that left some, as those of one execution of the suite."""
    parts = [json.loads(s.results.read_text()) for s in stages if s.results.exists()]
    if not parts:
        return None
    rest = {
        "seconds": sum(part["seconds"] for part in parts),
        "benchmarks": [record for part in parts for record in part["benchmarks"]],
    }
    return {**parts[0], **rest}


def publish(results: dict[str, Any], root: Path) -> tuple[Path, str]:
    """Write the results and the page made from them; the path of the results, and a short table."""
    sys.path.insert(0, str(ROOT))  # tangentfast itself
    import document
    import machine
    from bars import verdicts
    from readings import Results

    name = f"{results['date']}-{results['commit']}.json"
    path = root / "benchmarks" / "results" / machine.slug(results["machine"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    document.document(root / "benchmarks" / "results", root)
    lines = [
        f"{'met   ' if bar.met(value) else 'MISSED'} {value:6.2f} "
        f"{'≥' if bar.at_least else '≤'} {bar.limit:.2f}  {bar.what}\n"
        for bar, value in verdicts(Results.load(path))
    ]
    return path, "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: GPU tests skip, benchmarks are tiny and publish nothing",
    )
    options = parser.parse_args()
    if unknown := set(options.stages) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        sys.stderr.write("make gpu: no GPU is visible to torch; expected one with CUDA\n")
        return 2
    chosen = [s for s in STAGES if not options.stages or s.name in options.stages]
    environment = {"BENCH_SMOKE": "1"} if options.rehearse else {}
    outcomes = {}
    for stage in chosen:
        # A machine without a GPU has few cores to compile on, as a rule.
        patience = 8 if options.rehearse else 1
        outcomes[stage.name] = execute(stage, environment, patience)
        sys.stdout.write(f"{stage.name}: {outcomes[stage.name]}\n")
        sys.stdout.flush()
    results = gather(chosen)
    sys.stdout.write("".join(f"{name:16s} {outcome}\n" for name, outcome in outcomes.items()))
    if results is not None and not options.rehearse:
        path, short = publish(results, ROOT)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n{short}")
    return int(any("FAILED" in o or "STOPPED" in o for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
