"""What is timed is the same computation in every arm, and README's table says what the JSON says."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from fusedmoe import speed
from fusedmoe.__main__ import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", speed.MODES)
@pytest.mark.parametrize("subject", speed.SUBJECTS)
def test_arms_compute_the_same(subject, mode):
    case = speed.Case(subject, 4, mode)
    case.check()
    results = {name: call() for name, call in case.arms.items()}
    shapes = {name: [tuple(t.shape) for t in (result if isinstance(result, tuple) else (result,))] for name, result in results.items()}
    assert list(shapes) == ["fused", "eager", "eager, medium", "restructured", "restructured, medium"]
    assert shapes["fused"] == shapes["eager"] == shapes["eager, medium"]
    # Its parameters are arranged otherwise; output and d_x are the same.
    assert shapes["restructured"][0] == shapes["restructured, medium"][0] == shapes["eager"][0]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_wrong_arm_is_not_timed():
    case = speed.Case("MMoE T3e8", 4, "inference")
    case._network = lambda layer, network=case._network: network(layer) if layer is case.eager else shifted(network(layer))
    with pytest.raises(AssertionError, match="the worst in out"):
        case.check()


def test_a_wrong_rival_is_not_timed():
    case = speed.Case("MMoE T3e8", 4, "inference")
    case._rewritten = shifted(case._rewritten)
    with pytest.raises(AssertionError, match="the worst in out"):
        case.check()


def shifted(network):
    """The network with another output."""
    return lambda x, params, table: (network(x, params, table)[0] + 1, ())


def test_flops_are_the_tables():
    case = speed.Case("MMoE T3e8", 4, "inference")
    experts, gates, mixing = 8 * (256 * 256 + 256 * 128), 3 * 8 * 256, 3 * 8 * 128
    assert case.flops == 4 * 2 * (experts + gates + mixing)
    assert speed.Case("MMoE T3e8", 4, "training step").flops == 3 * case.flops


def test_every_round_times_every_arm_and_in_turn():
    order = []
    case = speed.Case("MMoE T3e8", 1, "inference")
    case.arms = {name: lambda name=name: order.append(name) for name in ("fused", "eager", "third")}
    times = speed.measure(case, rounds=3)
    assert list(times) == ["fused", "eager", "third"]
    firsts = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    # Three warm-ups, then the rounds, each begun by another arm.
    assert firsts == ["fused", "eager", "third", "fused", "eager", "third", "eager", "third", "fused", "third", "fused", "eager"]


def test_times_are_medians_and_fifths():
    assert speed.times_of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == speed.Times(2.5, 1.0, 4.0)


def test_the_command_prints_every_case(monkeypatch, capsys):
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "BATCHES", (2,))
    monkeypatch.setattr(speed, "measure", lambda case: {name: speed.times_of([2e-6, 4e-6]) for name in case.arms})
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert all(subject in shown for subject in speed.SUBJECTS) and "x eager" in shown and "x best" in shown
    assert "over the fastest of eager; eager, medium; restructured; restructured, medium." in " ".join(shown.split())


@pytest.fixture(scope="module")
def report():
    return runpy.run_path(str(ROOT / "bench" / "report.py"))


def saved(**arms):
    info = {
        "subject": "MMoE T3e8",
        "mode": "inference",
        "batch": 64,
        "flops": 10**8,
        "share_of_peak": 0.5,
        "arms": {k: {"median": v, "p20": v / 2, "p80": 2 * v} for k, v in arms.items()},
    }
    machine = {"cpu": "Fast CPU", "isa": "avx2", "threads": 1, "precision": "float32", "peak_gflops": 200.0}
    machine |= {"python": "3.11.9", "torch": "2.13.0", "fusedmoe": "0.1.0"}
    return {"machine_info": machine, "commit_info": {"id": "0123456789abcdef", "dirty": False}, "benchmarks": [{"extra_info": info}]}


def test_the_table_says_what_was_measured(report):
    text = report["table"](json.loads(json.dumps(saved(fused=1e-3, eager=4e-3, restructured=2.5e-3))))
    row = text.splitlines()[-1]
    assert row == "| MMoE T3e8 | inference | 64 | 1.00 (0.500 to 2.00) | 4.00 | **4.0** | 2.5 (restructured) | 50% |"
    for told in ("Fast CPU", "1 thread", "`0123456789`.", "200 GFLOP/s", "torch 2.13.0", "the fastest of: eager; restructured."):
        assert told in text


def test_a_changed_tree_is_told(report):
    results = saved(fused=1e-3, eager=4e-3)
    results["commit_info"]["dirty"] = True
    assert "`0123456789` with changes" in report["table"](results)


def test_the_table_is_put_between_the_markers(report):
    begin, end = report["BEGIN"], report["END"]
    once = report["replace_between"](f"above\n{begin}\nold\n{end}\nbelow\n", "new")
    assert once == f"above\n{begin}\n\nnew\n\n{end}\nbelow\n"
    assert report["replace_between"](once, "new") == once
    with pytest.raises(ValueError, match="once each, got 0 and 0"):
        report["replace_between"]("no markers", "new")


def test_readme_shows_the_saved_results(report):
    source = ROOT / "bench" / "results" / "cpu.json"
    assert source.exists(), "run `make bench`"
    results = json.loads(source.read_text())
    assert report["table"](results) in (ROOT / "README.md").read_text(), "run `make report`"
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        assert {"fused", "eager", "eager, medium", "restructured", "restructured, medium", "torch.compile"} == set(info["arms"])
        rate = info["flops"] / info["arms"]["fused"]["median"]
        assert info["share_of_peak"] == pytest.approx(rate / (1e9 * results["machine_info"]["peak_gflops"]))
