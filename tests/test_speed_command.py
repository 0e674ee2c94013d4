"""The command of the benchmark, the file it writes and what README makes of it.

No test asserts a time.
"""

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from fusedmoe.__main__ import main
from fusedmoe.reference.layers import PLE
from fusedmoe.speed import arms, command, machine, measuring, own_model, results
from fusedmoe.speed.measuring import times_of

ROOT = Path(__file__).parent.parent
SIZES = [
    "--tasks",
    "2",
    "--input",
    "6",
    "--experts",
    "5,4",
    "--batch",
    "2",
    "--threads",
    "1",
    "--rounds",
    "2",
    "--no-compile",
]


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch):
    """No worker, no measuring of the machine."""
    before = torch.get_num_threads()
    session = arms.Session
    monkeypatch.setattr(command, "Session", lambda backend: session(backend, runtimes=False))
    described = {
        "cpu": "Fast CPU",
        "isa": "avx2",
        "peak_gflops": 200.0,
        "versions": {"torch": "2.13.0"},
        "commit": {"id": "0123456789abcdef", "dirty": False},
    }
    monkeypatch.setattr(
        command,
        "describe",
        lambda: described | {"read_gb_per_second": {"L2": 100.0}, "medium_computes_in": "bfloat16", "caches": {}},
    )
    monkeypatch.setattr(results, "peak_gflops", lambda seconds: 100.0)
    monkeypatch.setattr(measuring, "SHORTEST_ROUND", 1e-4)
    yield
    torch.set_num_threads(before)


def test_ones_own_sizes_are_measured_and_saved(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["bench", "--family", "ple", *SIZES, "--dtype", "fp32,bf16", "--json", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "absent: " in shown and "ONNX Runtime" in shown and "left out on demand" in shown
    saved = results.load(path)
    assert saved["machine"]["peak_gflops"] == 100.0 and saved["overhead"]["tensors"] == 39
    first, step, *_ = saved["cases"]
    assert [(r["mode"], r["dtype"]) for r in saved["cases"]][:2] == [
        ("inference", "float32"),
        ("training step", "float32"),
    ]
    assert {"fused", "eager", "restructured"} <= set(first["arms"]) and first["rounds"] == 2
    assert 0 < step["memory"]["fused, recompute"]["saved_bytes"] <= step["memory"]["fused"]["saved_bytes"]
    assert step["memory"]["eager"]["saved_bytes"] > 0
    assert results.cell_of(first).key == results.cell_of(json.loads(json.dumps(first))).key


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "results.json"
    asked = ["bench", "--family", "mmoe", *SIZES[:4], "--experts", "5", *SIZES[6:], "--json", str(path)]
    assert main([*asked, "--mode", "inference"]) == 0
    before = results.load(path)["cases"]
    assert main([*asked, "--resume"]) == 0
    after = results.load(path)["cases"]
    assert after[0] == before[0] and [record["mode"] for record in after] == ["inference", "training step"]
    saved = results.load(path)
    results.save(path, saved["machine"] | {"cpu": "Slow CPU"}, {}, after)
    assert main([*asked, "--resume"]) == 2
    assert "cpu: expected Fast CPU, this run's, got Slow CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch 1", "--batch: expected with --layer, --family or --model, got the grid quick"),
        (
            "--family mmoe --experts 5,4",
            "experts: expected the layers of one level for mmoe, joined by hyphens (5-4), got 5,4",
        ),
        ("--family ple --threads 4096", "threads: expected at most"),
        ("--family ple --backend fast", "backend: expected auto, cpu, triton, cuda, reference, got 'fast'"),
        ("--family ple --resume", "--resume: expected --json FILE, got none"),
        ("--model nothing", "--model: expected package.module:factory"),
        ("--model no_such_package:f", "No module named 'no_such_package'"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said, capsys):
    assert main(["bench", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--family nothing", "invalid choice: 'nothing'"),
        ("--family ple --batch 1,x", "expected whole numbers of at least 1, separated by commas, got '1,x'"),
        ("--family ple --experts 5,-", "expected widths like 512,256 (two levels) or 256-128"),
        ("--family ple --dtype fp8", "expected float32, bfloat16 or fp32, bf16, separated by commas, got 'fp8'"),
        ("--family ple --tasks 0", "expected a whole number of at least 1, got '0'"),
        ("--quick --family ple", "not allowed with argument"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *words.split()])
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def users(monkeypatch):
    """A module of the user's."""
    module = types.ModuleType("users_module")
    monkeypatch.setitem(sys.modules, "users_module", module)
    return module


def test_ones_own_model_is_measured(users, capsys):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = torch.nn.Linear(4, 6), PLE(6, [[5], [4]], 2, 1, 1)

        def forward(self, x):
            return {"out": [self.layer(self.first(x).unsqueeze(1).expand(-1, 3, -1))]}

    users.factory = lambda rows: (Model(), torch.randn(rows, 4))
    assert main(["bench", "--model", "users_module:factory", "--batch", "2,3", "--rounds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "layer: PLE as ple" in shown and "training step" in shown and "x eager" in shown


def test_a_model_without_layers_is_reported(users, capsys):
    users.factory = lambda: (torch.nn.Linear(3, 3), (torch.ones(2, 3),))
    assert main(["bench", "--model", "users_module:factory", "--batch", "2"]) == 0
    assert "fused: 0" in capsys.readouterr().out
    users.factory = lambda: torch.nn.Linear(3, 3)
    assert main(["bench", "--model", "users_module:factory", "--batch", "2"]) == 2
    assert (
        "a function that returns (model, inputs), and may take the number of rows; it returned Linear"
        in capsys.readouterr().err
    )


def test_a_fused_model_that_is_wrong_is_not_timed():
    model = PLE(6, [[5], [4]], 2, 1, 1)
    with pytest.raises(AssertionError, match="output 0: expected an error of at most"):
        own_model.check(model, PLE(6, [[5], [4]], 2, 1, 1), (torch.randn(3, 3, 6),))


def test_the_machine_is_described():
    """Without its bandwidths, which take seconds."""
    assert set(machine.versions()) >= {"python", "torch", "fusedmoe", "openvino"}
    assert machine.peak_gflops(0.001) > 0
    assert machine.read_bandwidth(2**16, 0.001) > 0
    assert all(size > 0 for size in machine.caches().values())


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        # Scripts of a folder find one another.
        patch.syspath_prepend(str(ROOT / "bench"))
        return runpy.run_path(str(ROOT / "bench" / "report.py"))


def record(**more):
    arms = {"fused": 1e-3, "eager": 4e-3, "torch.compile": 2e-3, "restructured": 1.5e-3, "restructured, medium": 0.5e-3}
    models = {"fused": "fused", "eager": "reference", "torch.compile": "reference"}
    precisions = {"restructured, medium": "bfloat16"}
    saved = {
        name: {
            **times_of([s, s])._asdict(),
            "precision": precisions.get(name, "float32"),
            "model": models.get(name, "restructured"),
        }
        for name, s in arms.items()
    }
    sizes = {
        "family": "mmoe",
        "tasks": 3,
        "input": 256,
        "experts": [[256, 128]],
        "per_task": 2,
        "shared": 1,
        "total": 8,
    }
    asked = {
        "layer": "MMoE T3e8",
        "sizes": sizes,
        "mode": "inference",
        "batch": 64,
        "dtype": "float32",
        "threads": 1,
        "rounds": 20,
    }
    return {
        **asked,
        "flops": 10**8,
        "bytes": 10**6,
        "peak_gflops": 200.0,
        "arms": saved,
        "absent": {"OpenVINO": "not installed"},
        **more,
    }


def test_ratios_count_rivals_of_the_same_precision():
    found = results.ratios(record())
    assert {name: (ratio.times, ratio.arm) for name, ratio in found.items()} == {
        "eager": (4.0, "eager"),
        "reference": (2.0, "torch.compile"),
        "best": (1.5, "restructured"),
    }
    assert results.ratios(record(), "fused, frozen") == {}
    assert results.share_of_peak(record(), 200.0) == 0.5 and results.share_of_peak(record(threads=2), 200.0) == 0.25


def results_of(*records):
    described = {
        "cpu": "Fast CPU",
        "isa": "avx2",
        "peak_gflops": 200.0,
        "versions": {"torch": "2.13.0"},
        "commit": {"id": "0123456789abcdef", "dirty": True},
    }
    overhead = {
        "tensors": 39,
        "arms": {name: {"median": 1e-5} for name in ("forward", "forward, backward", "torch.cat")},
    }
    described |= {"read_gb_per_second": {"L2": 100.0}, "medium_computes_in": "bfloat16", "caches": {}}
    return {"machine": described, "overhead": overhead, "cases": list(records)}


def test_readme_says_what_was_measured(report):
    memory = {
        name: {"saved_bytes": size, "peak_bytes": None} for name, size in (("fused", 10**6), ("eager", 4 * 10**6))
    }
    saved = results_of(record(), record(threads=2), record(mode="training step", memory=memory))
    text = report["readme"](saved)
    assert "| MMoE T3e8, inference | **4.0** |" in text and "fusedmoe is 1.5 to 1.5 times as fast" in text.replace(
        "\n", " "
    )
    page = report["page"](saved)
    for told in ("Fast CPU", "`0123456789` with changes", "torch 2.13.0"):
        assert told in text and told in page
    prose = page.replace("\n", " ")
    assert "200 GFLOP/s" in prose and '"medium" computes in bfloat16' in prose
    assert (
        "| MMoE T3e8, inference | **4.0** / 2.0 / 1.5, 50% |" in page
        and "float32, 2 threads:" in page
        and "39 tensors" in prose
    )
    assert "0.500 [0.500, 0.500] (bfloat16)" in page and "OpenVINO (3 of 3 cases): not installed" in page
    assert (
        "- MMoE T3e8, inference, B = 64: 1.00" in page
        and "| MMoE T3e8, float32, 64 | 1.00 | 4.00 | 0.25 | - | - | - |" in page
    )


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    pictures = runpy.run_path(str(ROOT / "bench" / "pictures.py"))
    assert pictures["draw"](results_of(record()), tmp_path) == []
    assert pictures["draw"](results_of(record(), record(batch=1)), tmp_path) == ["speed", "peak"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peak.png", "speed.png"]


def test_the_tables_are_put_between_the_markers(report):
    begin, end = report["BEGIN"], report["END"]
    once = report["replace_between"](f"above\n{begin}\nold\n{end}\nbelow\n", "new", begin, end, "page")
    assert once == f"above\n{begin}\n\nnew\n\n{end}\nbelow\n"
    assert report["replace_between"](once, "new", begin, end, "page") == once
    with pytest.raises(ValueError, match="once each, got 0 and 0"):
        report["replace_between"]("no markers", "new", begin, end, "page")


def test_readme_shows_the_saved_results(report):
    assert report["SOURCE"].exists(), "run `make bench`"
    saved = results.load(report["SOURCE"])
    drawn = [name for name in ("speed", "peak", "memory") if (ROOT / f"docs/{name}.png").exists()]
    assert report["readme"](saved, drawn) in (ROOT / "README.md").read_text(), "run `make report`"
    assert report["page"](saved, drawn) == (ROOT / "docs/speed.md").read_text(), "run `make report`"
