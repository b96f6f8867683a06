"""report.html, report.md and compare.html: whole, self-contained, and never half-written."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import standins
from synthetic_results import results

from tangentfast.study.report import ResultsError, compare, write
from tangentfast.study.report.files import publish
from tangentfast.study.report.schema import load
from tangentfast.study.report.tables import tables

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Every tag, what it refers to, and the text; asserts that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.references += [str(found[key]) for key in ("src", "href", "data") if key in found]
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def run_folder(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_files(written: tuple[Path, list[Path]]) -> None:
    run, paths = written
    assert paths[0] == run / "report.html"
    assert len(paths) == len(set(paths)) == 2 + 10 + 2 * 11
    found = {path for path in run.rglob("*") if path.is_file()}
    assert found == {*paths, run / "results.json"}
    assert all(path.stat().st_size > 100 for path in paths)


def test_page_is_self_contained(written: tuple[Path, list[Path]]) -> None:
    run, _ = written
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert all(ref.startswith(("#", "data:")) for ref in page.references)
    assert not re.findall(r"url\(|@import", text)
    targets = set(re.findall(r'id="([^"]+)"', text))
    assert {ref[1:] for ref in page.references if ref.startswith("#")} <= targets
    assert len(page.images) == 11
    for image in page.images:
        kind, data = str(image["src"]).split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert ElementTree.fromstring(svg).tag.endswith("}svg")
        assert "prefers-color-scheme:dark" in svg
        assert "currentColor" in svg
        assert "#1b1f24}" in svg  # ink of the light page, in the style alone
        assert svg.count("#1b1f24") == 1
        assert image["alt"]


def test_page_tells_the_numbers(written: tuple[Path, list[Path]]) -> None:
    run, _ = written
    page = Page((run / "report.html").read_text())
    found = load(run)
    for table in tables(found):
        assert table.caption in page.text
        for row in table.rows:
            assert all(" ".join(cell.split()) in page.text for cell in row)
    assert "tangentfast study run --preset small --out 'my <run>'" in page.text
    for word in ("vit_small_patch14_dinov2", "torch 2.10.0", "a CPU", "20 min 34 s", "train.lr"):
        assert word in page.text
    assert "The numbers support the claim: NTK-linear is better than non-linear" in page.text


def test_markdown_tells_the_same(written: tuple[Path, list[Path]]) -> None:
    run, _ = written
    text = (run / "report.md").read_text()
    for table in tables(load(run)):
        assert table.markdown() in text
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 11
    assert all((run / picture).is_file() for picture in pictures)


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>|&_$\\no$"
    found = results(tasks=(evil, "b"), seeds=(0,), regimes=("ntk",))
    found["name"] = found["control"] = found["command"] = evil
    found["tasks"][-1]["name"] = evil + "2"
    found["control"] = evil + "2"
    run = run_folder(tmp_path / "run", found)
    paths = write(run)
    page = Page((run / "report.html").read_text())
    assert "script" not in page.tags
    assert evil in page.text
    assert all(run in path.resolve().parents for path in paths)


@pytest.mark.parametrize("what", ["one seed", "one task", "nothing measured", "nan", "no runs"])
def test_what_is_missing_is_left_out(tmp_path: Path, what: str) -> None:
    tasks = ("a", "b") if what == "nan" else ("a",)
    seeds = (0,) if what == "one seed" else (0, 1)
    found = results(tasks=tasks, seeds=seeds, regimes=("nonlinear", "ntk"))
    found["regimes"]["ntk"]["seconds_per_step"] = None
    for regime in found["regimes"].values():
        for run in regime["runs"]:
            if what == "nothing measured":
                run.clear()
                run |= {"seed": 0, "single": {}}
            elif what == "nan":
                run["single"] = dict.fromkeys(run["single"], math.nan)
                run["addition"] |= dict.fromkeys(("absolute", "normalized", "at_one"), math.nan)
                run["disentanglement"][0]["box"] = math.nan
                run["negation"] = None
        if what == "no runs":
            regime["runs"] = []
    if what in ("nothing measured", "no runs"):
        found |= {"head_study": [], "control": None, "base": {}}
        found["tasks"].pop()
    run = run_folder(tmp_path, found)
    write(run)
    page = Page((run / "report.html").read_text())
    assert "NTK-linear" in page.text
    assert " nan" not in page.text.lower()
    if what == "one seed":
        assert "with one seed, so undecided" in page.text


def test_a_full_disk_leaves_the_earlier_files_whole(tmp_path: Path) -> None:
    publish(tmp_path, {"figures/a.svg": b"old", "page.html": b"old"})
    # The last of the files does not fit; the others would.
    files = {"figures/a.svg": b"new", "figures/b.svg": b"new", "page.html": b"new" * 10_000}
    with standins.largest_file(20_000), pytest.raises(OSError, match="large"):
        publish(tmp_path, files)
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.svg": b"old", "page.html": b"old"}
    publish(tmp_path, files)
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {Path(name).name: content for name, content in files.items()}


def test_a_full_disk_leaves_no_half_report(tmp_path: Path) -> None:
    run = run_folder(tmp_path, results(tasks=("a",), seeds=(0,), regimes=("ntk",)))
    with standins.largest_file(40_000), pytest.raises(OSError, match="large"):
        write(run)
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["results.json"]


def test_compare(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", results())
    fewer = results(seeds=(0, 1), regimes=("nonlinear", "ntk"))
    fewer["model"]["name"] = "vit_other"
    second = run_folder(tmp_path / "second", fewer)
    out = tmp_path / "new" / "out"
    paths = compare([first, second], out)
    assert paths[0] == out / "compare.html"
    assert {path for path in out.rglob("*") if path.is_file()} == set(paths)
    page = Page((out / "compare.html").read_text())
    assert len(page.images) == 1
    assert all(ref.startswith("data:") for ref in page.references)
    text = (out / "compare.md").read_text()
    assert "| measure | regime | first | second |" in text  # both are named "synthetic"
    assert "| attention-only | 0, 1, 2 | not run | no |" in text
    assert "| NTK-linear | 0, 1, 2 | 0, 1 | no |" in text
    assert "vit_other" in text
    assert "| head |" not in text  # the same in both


def test_compare_refuses(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", results(tasks=("a",), seeds=(0,)))
    with pytest.raises(ResultsError, match=r"compare: expected two runs or more, got 1"):
        compare([run], tmp_path / "out")
    with pytest.raises(ResultsError, match=r"none: No such file"):
        compare([run, tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
