"""Turn the results of every machine into docs/benchmarks.md, its charts and README's short table.

    python benchmarks/document.py

Everything shown is computed from the seconds of single rounds: a ratio is the median over the
ratios of rounds, a time the median over rounds. What was not measured is left out. The newest
results of each folder of benchmarks/results/ stand side by side; those of GPUs are in
docs/benchmarks-gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import figures
import pages
from readings import newest

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def document(folder: Path, root: Path) -> list[Path]:
    """Write the pages and their charts, and README's part where README.md is; the paths written."""
    written: list[Path] = []
    charts = root / "docs" / "figures"
    for name, gpu in (("benchmarks", False), ("benchmarks-gpu", True)):
        every = [r for r in newest(folder) if bool(r.machine["gpu"]) == gpu]
        if not every:
            continue
        drawn = {r.folder: figures.draw(r, charts) for r in every}
        path = root / "docs" / f"{name}.md"
        path.write_text(pages.page(every, drawn))
        written += [path, *(charts / chart for names in drawn.values() for chart in names)]
        readme = root / "README.md"
        if not gpu and readme.exists():
            readme.write_text(between(readme.read_text(), pages.short(every)))
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
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from all results.")
    help_ = "a folder with a folder of JSON for each machine"
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help=help_)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/")
    options = parser.parse_args()
    if options.root == ROOT and any(r.smoke for r in newest(options.results)):
        raise SystemExit("document.py: results of BENCH_SMOKE=1 say nothing; pass --root to try")
    for path in document(options.results, options.root):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
