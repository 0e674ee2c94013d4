"""What is timed is the same computation in every arm, under its true precision; what cannot run is
named. No test asserts a time."""

import os
import signal

import pytest
import torch

from fusedmoe.families import FAMILIES
from fusedmoe.speed import arms, grids, memory, parity, runtimes, subjects, worker
from fusedmoe.speed.arms import Local, Session
from fusedmoe.speed.case import Case
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.measuring import Times, measure, times_of
from fusedmoe.speed.runtimes import Absent
from fusedmoe.speed.worker import Died, Worker, missing

SMALL = subjects.Sizes("ple", 2, 6, ((5,), (4,)))


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def session():
    """A session that starts no worker."""
    return Session(runtimes=False)


def small(mode="inference", dtype="float32", **more) -> Cell:
    return Cell("small", SMALL, mode, 4, dtype, compiled=False, **more)


def narrow(layer) -> subjects.Sizes:
    """The named layer, each of its widths a 32nd."""
    sizes = subjects.SUBJECTS[layer]
    return sizes._replace(input=6, experts=tuple(tuple(width // 32 for width in level) for level in sizes.experts))


@pytest.mark.parametrize("layer", subjects.SUBJECTS)
def test_every_layer_has_rivals_on_both_networks(layer):
    built = subjects.build(narrow(layer))
    out = runtimes.network_of(built, "reference")(torch.ones(2, 6))
    assert runtimes.network_of(built, "restructured")(torch.ones(2, 6)).shape == out.shape == (2, *built.table.output)


@pytest.mark.parametrize("mode", grids.MODES)
@pytest.mark.parametrize("layer", subjects.MAIN)
def test_arms_compute_the_same(session, layer, mode):
    case = Case(Cell(layer, narrow(layer), mode, 4, compiled=False), session)
    case.check()
    assert [name for name in case.arms if name != "fused, frozen"] == [
        "fused",
        "eager",
        "eager, medium",
        "restructured",
        "restructured, medium",
    ]
    shape = (4, 6) if mode == "training step" else (4, *case.setting.layer.table.output)
    assert {name: tuple(arm.result().shape) for name, arm in case.arms.items()} == dict.fromkeys(case.arms, shape)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("mode", grids.MODES)
def test_bfloat16_has_a_case_of_its_own(session, mode):
    case = Case(small(mode, "bfloat16"), session)
    case.check()
    assert case.setting.work.x.dtype == torch.bfloat16 and set(case.precisions.values()) == {"bfloat16"}
    assert {"eager", "restructured"} <= set(case.arms)
    # Where no backend takes it, the fused arm says so.
    assert "fused" in case.arms or "bfloat16" in case.absent["fused"]


def test_medium_is_no_rival_of_float32_where_it_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(arms, "precision_of_medium", lambda: "bfloat16")
    assert {kind.name: precision for kind, precision in arms.kinds_of(small())}["eager, medium"] == "bfloat16"
    assert "eager, medium" in {kind.name for kind, _ in arms.kinds_of(small(dtype="bfloat16"))}
    monkeypatch.setattr(arms, "precision_of_medium", lambda: "float32")
    assert {kind.name: precision for kind, precision in arms.kinds_of(small())}["eager, medium"] == "float32"
    assert "eager, medium" not in {kind.name for kind, _ in arms.kinds_of(small(dtype="bfloat16"))}


@pytest.mark.parametrize("name", ["fused", "restructured"])
def test_a_wrong_arm_is_not_timed(session, monkeypatch, name):
    case = Case(small(), session)
    real = parity.check
    monkeypatch.setattr(
        parity, "check", lambda arm, network, *rest: real(arm, shifted(network) if arm == name else network, *rest)
    )
    with pytest.raises(AssertionError, match=f"{name}: .*the worst in out"):
        case.check()


def shifted(network):
    """The network with another output."""
    return lambda x, params, table: (network(x, params, table)[0] + 1, ())


def test_a_wrong_rival_is_absent_and_a_wrong_result_of_ours_stops_the_run(session):
    case = Case(small(), session)
    case.arms["eager, medium"] = Local(lambda call=case.arms["eager"].call: call() + 1)
    case.check()
    assert "eager, medium" not in case.arms and "wrong: expected an error of at most" in case.absent["eager, medium"]
    case.arms["fused"] = Local(lambda call=case.arms["eager"].call: call() + 1)
    with pytest.raises(AssertionError, match="small, inference, B = 4, float32, 1 thread, fused: wrong"):
        case.check()


def test_what_is_absent_says_why(session, monkeypatch):
    monkeypatch.setattr(worker, "version", lambda package: (_ for _ in ()).throw(worker.PackageNotFoundError(package)))
    assert missing("openvino").startswith("not installed: onnx, onnxscript, openvino; `pip install")
    case = Case(small(), Session())
    assert case.absent["OpenVINO"] == missing("openvino") and case.absent["restructured, ONNX Runtime"] == missing(
        "onnxruntime"
    )
    assert "must be compiled" in case.absent["torch.compile"]
    lone = Case(
        Cell("one", subjects.Sizes("shared_bottom", 2, 6, ((5, 4),)), "inference", 2, compiled=False),
        Session(backend="reference"),
    )
    assert "fused" in lone.arms


def test_other_runtimes_compute_the_same_in_processes_of_their_own():
    """Not zentorch, which compiles for half a minute; every benchmark checks its results."""
    names = ("onnxruntime", "openvino")
    lacking = [reason for reason in map(missing, names) if reason]
    if lacking:
        pytest.skip("; ".join(lacking))
    with Session() as session:
        setting = arms.Setting(small(), session)
        rivals = {
            (name, model): arms.runtime(name)(setting, model)
            for name in names
            for model in ("reference", "restructured")
        }
        results = {which: (arm.result(), "float32") for which, arm in rivals.items()}
        plain = {"float32": setting.plain(torch.float32)}
        assert parity.wrong_results(setting.cell, results, plain, parity.expectation(SMALL, 4, torch.float32)) == {}
        assert all(arm.repeats() >= 1 and arm.seconds(1) > 0 for arm in rivals.values())
        processes = [session.workers.running[name, 1].process for name in names]
        assert all(process.poll() is None and process.pid != os.getpid() for process in processes)
    assert [process.poll() for process in processes] == [0, 0]


def test_a_worker_that_dies_says_how():
    runner = Worker("onnxruntime", 1)
    os.kill(runner.process.pid, signal.SIGKILL)
    with pytest.raises(Died, match="its process was ended by SIGKILL"):
        runner.ask("forget")
    runner.close()


def test_a_worker_survives_what_a_runtime_raises():
    built = []
    with pytest.raises(KeyError):
        worker.answer(
            built, "build", (runtimes.Job("no such", "reference", SMALL, "inference", "float32", 1, None, None),)
        )
    assert built == []


def test_flops_and_bytes_are_the_tables(session):
    cell = Cell("MMoE T3e8", subjects.SUBJECTS["MMoE T3e8"], "inference", 4, compiled=False)
    case = Case(cell, session)
    experts, gates, mixing = 8 * (256 * 256 + 256 * 128), 3 * 8 * 256, 3 * 8 * 128
    assert case.flops == 4 * 2 * (experts + gates + mixing)
    params = experts + 8 * (256 + 128) + gates + 3 * 8
    assert case.bytes == 4 * (4 * 256 + params + 4 * 3 * 128)
    step = Case(cell._replace(mode="training step"), session)
    assert step.flops == 3 * case.flops
    assert step.bytes == 4 * (2 * (4 * 256 + params) + 4 * 3 * 128)


def test_every_round_times_every_arm_and_in_turn():
    order = []
    fakes = {name: Local(lambda name=name: order.append(name)) for name in ("fused", "eager", "third")}
    times = measure(fakes, rounds=3)
    assert list(times) == ["fused", "eager", "third"]
    firsts = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    # Three warm-ups, then the rounds, each begun by another arm.
    assert firsts == [
        "fused",
        "eager",
        "third",
        "fused",
        "eager",
        "third",
        "eager",
        "third",
        "fused",
        "third",
        "fused",
        "eager",
    ]


def test_times_are_medians_and_fifths():
    assert times_of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == Times(2.5, 1.0, 4.0)


def test_saved_bytes_are_storages_without_parameters_and_x():
    linear = torch.nn.Linear(8, 16)
    # The linear map saves x and its weight; sigmoid its output [4, 16]; a view of it is the same
    # storage.
    network = torch.nn.Sequential(linear, torch.nn.Sigmoid(), torch.nn.Flatten(0), torch.nn.Sigmoid())
    assert memory.saved_bytes(network, torch.ones(4, 8)) == 2 * 4 * 16 * 4
    assert memory.saved_bytes(linear, torch.ones(4, 8)) == 0


def test_the_peak_rises_by_what_a_call_holds():
    size = 64 * 2**20
    risen = memory.peak_rise(lambda: torch.ones(size // 4).sum())
    if risen is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert risen > size // 2


def test_grids_name_every_case_once():
    for name, grid in grids.GRIDS.items():
        keys = [cell.key for cell in grid()]
        assert len(keys) == len(set(keys)), name
    every = {cell.key for cell in grids.everything()}
    assert len(every) == len(subjects.SUBJECTS) * 2 * 6 * 2 * 2
    assert {cell.key for cell in (*grids.quick(), *grids.floors())} <= every


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_measured_at_sizes_of_ones_own(family):
    one_level = any(
        name in subjects.ONE_LEVEL for name in subjects.inspect.signature(subjects.CLASSES[family]).parameters
    )
    layer = subjects.build(subjects.Sizes(family, 3, 6, ((5, 4),) if one_level else ((5,), (4,))))
    out = subjects.Called(layer.module, layer.slots)(torch.ones(2, 6))
    assert out.shape == (2, *layer.table.output) or out.shape[1] == 3
    if one_level:
        with pytest.raises(
            ValueError,
            match=rf"experts: expected the layers of one level for {family}, joined by hyphens \(5-4\), got 5,4",
        ):
            subjects.build(subjects.Sizes(family, 3, 6, ((5,), (4,))))


def test_a_table_without_a_restructured_form_is_named():
    layer = subjects.build(SMALL)
    tanh = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5), torch.nn.ReLU())
    layer.module.experts[0][0].mlp_net = tanh
    wiring = subjects._ROWS["ple"].wiring(layer.module)
    with pytest.raises(Absent, match="no restructured form: level 0, experts: expected equal layers"):
        runtimes.network_of(layer._replace(wiring=wiring), "restructured")
