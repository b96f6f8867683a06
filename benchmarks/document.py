"""Turn the JSON of a run into docs/benchmarks.md, its figures and README's short table.

    python benchmarks/document.py benchmarks/results/<machine>/<date>-<commit>.json

Everything shown is computed from the seconds of single rounds: a ratio is the median over the
ratios of rounds, a time the median over rounds. What a run left out is left out of the page. A run
on a GPU writes docs/benchmarks-gpu.md and leaves the README alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import figures
import pages
from readings import Run

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def document(run: Run, root: Path) -> list[Path]:
    """Write the page and its figures, and README's part where README.md is; the paths written."""
    kind = "gpu" if run.machine["gpu"] else "cpu"
    folder = root / "docs" / "figures"
    drawn = figures.draw(run, folder, kind)
    page = root / "docs" / ("benchmarks-gpu.md" if kind == "gpu" else "benchmarks.md")
    page.write_text(pages.page(run, drawn))
    written = [page, *(folder / name for name in drawn)]
    readme = root / "README.md"
    if kind == "cpu" and readme.exists():
        readme.write_text(between(readme.read_text(), pages.short(run)))
        written.append(readme)
    return written


def between(text: str, part: str) -> str:
    """`text` with `part` between its two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or END in before or BEGIN in after:
        raise ValueError(f"README.md: expected {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{part}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from a run's JSON.")
    parser.add_argument("results", type=Path, help="the JSON of a run")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/")
    options = parser.parse_args()
    run = Run.load(options.results)
    if run.smoke and options.root == ROOT:
        raise SystemExit("document.py: a run with BENCH_SMOKE=1 says nothing; pass --root to try")
    for path in document(run, options.root):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
