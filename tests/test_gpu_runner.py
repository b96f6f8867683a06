"""benchmarks/gpu.py: stages leave their results even where another fails."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpu = pytest.importorskip("gpu")


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def python(name: str, code: str, **options: Any) -> Any:
    return gpu.Stage(name, [sys.executable, "-c", code], options.pop("seconds", 60), **options)


@pytest.mark.slow
def test_outcomes() -> None:
    ok = gpu.execute(python("ok", "import os; print(os.environ['A'] + os.environ['B'])",
                        environment={"A": "x"}), {"B": "y"})  # fmt: skip
    assert ok.startswith("ok, ")
    assert ok.endswith("; xy")
    assert gpu.execute(python("bad", "print('why'); exit(3)"), {}).startswith("FAILED with 3, ")
    assert (gpu.LOGS / "bad.log").read_text() == "why\n"
    orphan = "import time; time.sleep(5); open({!r}, 'w')".format(str(gpu.LOGS / "orphan"))
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {orphan!r}])"
    assert gpu.execute(python("slow", code, seconds=2), {}).startswith("STOPPED after its 2 s")
    time.sleep(4)
    assert not (gpu.LOGS / "orphan").exists()
    assert (
        gpu.execute(python("no", "", needs="no-such-program"), {})
        == "left out: no no-such-program here"
    )


def test_a_failed_stage_leaves_its_results() -> None:
    part = "import json; json.dump({'seconds': 2, 'benchmarks': [%d]}, open(r'%s', 'w')); exit(%d)"
    stages = [python(f"s{i}", part % (i, gpu.LOGS / f"s{i}.json", i)) for i in range(2)] + [
        python("none", "")
    ]
    assert [gpu.execute(s, {}).partition(",")[0] for s in stages] == ["ok", "FAILED with 1", "ok"]
    assert gpu.gather(stages) == {"seconds": 4, "benchmarks": [0, 1]}
    assert gpu.gather(stages[2:]) is None
    gpu.execute(python("s0", "exit(1)"), {})  # earlier results do not pass for new ones
    assert gpu.gather(stages[:1]) is None


def test_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "biuld"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no stage biuld; there are build, test, memcheck, bench-merge" in capsys.readouterr().err
    assert sum(stage.seconds for stage in gpu.STAGES) <= 9 * 60


def test_publish(tmp_path: Path) -> None:
    """What `gather` makes of the suites' files is results that the page can be made from."""
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text("<!-- benchmarks:begin --><!-- benchmarks:end -->")
    seconds = {"seconds": [1.0, 2.0]}
    record = {
        "name": "alpha_sweep", "suite": "tangents", "took": 1.0,
        "facts": {"model": "m", "batch": 1, "dtype": "float32", "points": 21, "sampled": 21,
                  "against": "torch.func.jvp, point by point", "rounds": 2},
        "variants": {name: seconds for name in (
            "tangentfast, one pass", "tangentfast, point by point",
            "torch.func.jvp, point by point")},
    }  # fmt: skip
    merge = {
        "name": "merge[8]", "suite": "merge", "took": 1.0,
        "facts": {"K": 8, "N": 1000, "dtype": "float32", "tensors": 1, "unit": "B",
                  "against": "add_ loop", "rounds": 1},
        "variants": {"tangentfast": {"seconds": [1.1], "work": 10.0},
                     "add_ loop": {"seconds": [3.0], "work": 24.0},
                     "sum, then apply": {"seconds": [6.0], "work": 28.0},
                     "ceiling: copy_": {"seconds": [1.0], "work": 10.0}},
    }  # fmt: skip
    machine = gpu_machine()
    path, short = gpu.publish(
        {"date": "2026-01-01", "commit": "abc", "smoke": False, "seconds": 3.0,
         "machine": machine, "benchmarks": [record, merge]}, tmp_path,
    )  # fmt: skip
    assert path == tmp_path / "benchmarks/results/nvidia-h200/2026-01-01-abc.json"
    assert json.loads(path.read_text())["benchmarks"] == [record, merge]
    assert short == "met      0.91 ≥ 0.85  merge_, K = 8: share of the copy ceiling\n"
    assert not (tmp_path / "docs/benchmarks.md").exists()  # a GPU's results are no CPU's
    page = (tmp_path / "docs/benchmarks-gpu.md").read_text()
    assert "NVIDIA H200" in page
    assert "α sweep" in page


def gpu_machine() -> dict[str, Any]:
    import machine

    return machine.describe() | {"gpu": "NVIDIA H200"}
