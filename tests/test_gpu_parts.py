"""How `make gpu` follows its parts: one that crashes, hangs, is killed or raises costs itself
alone, and what was found is in the file."""

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def gpu(monkeypatch):
    """The modules of bench/, which stand beside one another as scripts do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu"), importlib.import_module("gpu_parts"), importlib.import_module("gpu_book")


def module(folder: Path, name: str, body: str) -> None:
    """A part of these tests, with `cases` as its body."""
    head = "import os, signal, subprocess, sys, time\nfrom gpu_cases import Case, Skipped\n\n\n"
    (folder / f"{name}.py").write_text(head + textwrap.dedent(body))


def run(gpu, folder: Path, parts: dict[str, tuple[str, float, float]], resume: bool = False) -> tuple[dict, bool]:
    """Run parts {letter: (module, seconds of the part, of a case)}; return what the JSON says, and
    whether all went well."""
    conductor, table, book = gpu
    known = {
        letter: table.Part(f"part {letter}", name, seconds, case_seconds)
        for letter, (name, seconds, case_seconds) in parts.items()
    }
    path = folder / "gpu.json"
    with (folder / "gpu.log").open("a") as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(conductor, "PARTS", known)
        patch.setenv("GPU_PATIENCE", "1")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), *sys.path))}
        well = conductor.run_parts(list(known), book.Book(path), log, environment, resume)
    return json.loads(path.read_text())["parts"], well


GOOD = """
def cases(book):
    return [Case("one", lambda: {"found": 1}), Case("two", lambda: {"found": 2})]
"""


def results(part: dict) -> dict:
    return {
        key: {name: value for name, value in result.items() if name != "took"}
        for key, result in part["results"].items()
    }


def test_a_case_that_kills_its_process_costs_itself_alone(gpu, tmp_path):
    body = """
    def die():
        os.kill(os.getpid(), signal.SIGSEGV)

    def cases(book):
        return [Case("before", lambda: {"found": 1}), Case("dies", die), Case("behind", lambda: {"found": 2})]
    """
    module(tmp_path, "dying", body)
    module(tmp_path, "good", GOOD)
    parts, well = run(gpu, tmp_path, {"a": ("dying", 60, 30), "b": ("good", 60, 30)})
    assert results(parts["a"]) == {
        "before": {"found": 1},
        "dies": {"error": "the process died of SIGSEGV"},
        "behind": {"found": 2},
    }
    assert (parts["a"]["status"], parts["b"]["status"], well) == ("done", "done", False)
    assert results(parts["b"]) == {"one": {"found": 1}, "two": {"found": 2}}


def test_a_case_that_hangs_is_cut_off_with_what_it_started(gpu, tmp_path):
    body = """
    def hang():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
        time.sleep(600)

    def cases(book):
        return [Case("hangs", hang), Case("behind", lambda: {"found": 2})]
    """
    module(tmp_path, "hanging", body)
    parts, well = run(gpu, tmp_path, {"a": ("hanging", 60, 3)})
    assert results(parts["a"]) == {"hangs": {"error": "no answer in 3 s"}, "behind": {"found": 2}}
    child = int(
        next(line.split()[1] for line in (tmp_path / "gpu.log").read_text().splitlines() if line.startswith("child "))
    )
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert not well


def test_a_part_at_its_limit_keeps_what_it_found_and_the_next_one_runs(gpu, tmp_path):
    body = """
    def cases(book):
        return [Case("quick", lambda: {"found": 1}), Case("slow", lambda: time.sleep(600)), Case("never", lambda: {})]
    """
    module(tmp_path, "slow", body)
    module(tmp_path, "good", GOOD)
    parts, _ = run(gpu, tmp_path, {"a": ("slow", 8, 60), "b": ("good", 60, 30)})
    assert results(parts["a"]) == {"quick": {"found": 1}, "slow": {"error": "cut off at the part's end"}}
    assert parts["a"]["status"] == "cut off after 8 s"
    assert parts["b"]["status"] == "done"


def test_a_process_that_waits_at_its_end_is_not_waited_for(gpu, tmp_path):
    """torch.compile's workers can keep an interpreter from ending for minutes."""
    body = """
    import atexit
    atexit.register(time.sleep, 600)
    CHILD = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def cases(book):
        return [Case("one", lambda: {"found": 1})]
    """
    module(tmp_path, "lingering", body)
    parts, well = run(gpu, tmp_path, {"a": ("lingering", 60, 60)})
    assert (parts["a"]["status"], well) == ("done", True)
    assert parts["a"]["seconds"] < 50


def test_a_run_that_is_ended_ends_its_part_and_leaves_a_whole_file(gpu, tmp_path):
    body = """
    def wait():
        print("process", os.getpid(), flush=True)
        time.sleep(600)

    def cases(book):
        return [Case("one", lambda: {"found": 1}), Case("two", wait)]
    """
    module(tmp_path, "waiting", body)
    script = """
    import os, sys
    from pathlib import Path
    import gpu, gpu_build, gpu_parts
    gpu.PARTS = {"a": gpu_parts.Part("part a", "waiting", 60, 60)}
    gpu_build.prepare = lambda log: ({"device": {"compute_mode": 1}}, dict(os.environ))
    sys.argv = ["gpu.py", "--json", "gpu.json"]
    sys.exit(gpu.main())
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(BENCH)))}
    command = [sys.executable, "-u", "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        inner = next(int(line.split()[1]) for line in process.stdout if line.startswith("process "))
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    state = Path(f"/proc/{inner}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["a"]
    assert (part["status"], results(part)) == ("running", {"one": {"found": 1}})


def test_errors_and_skips_are_results(gpu, tmp_path):
    body = """
    def wrong():
        raise AssertionError("d_x: expected 1, got 2")

    def lacking():
        raise Skipped("ncu is not installed")

    def cases(book):
        return [Case("wrong", wrong), Case("lacking", lacking), Case("right", lambda: {"found": 1})]
    """
    module(tmp_path, "mixed", body)
    parts, well = run(gpu, tmp_path, {"a": ("mixed", 60, 30)})
    assert results(parts["a"]) == {
        "wrong": {"error": "AssertionError: d_x: expected 1, got 2"},
        "lacking": {"skipped": "ncu is not installed"},
        "right": {"found": 1},
    }
    assert not well
    assert "Traceback" in (tmp_path / "gpu.log").read_text()


def test_a_device_that_is_lost_gets_a_fresh_process(gpu, tmp_path):
    body = """
    from types import SimpleNamespace

    def healthy_device():
        pass

    def lost_device():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    # In torch's place, which takes seconds to import.
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(synchronize=healthy_device))

    def lose():
        sys.modules["torch"].cuda.synchronize = lost_device
        raise RuntimeError("illegal memory access")

    def healthy():
        return {"process": os.getpid()}

    def cases(book):
        return [Case("before", healthy), Case("loses", lose), Case("behind", healthy)]
    """
    module(tmp_path, "losing", body)
    parts, _ = run(gpu, tmp_path, {"a": ("losing", 60, 30)})
    found = results(parts["a"])
    assert found["loses"] == {"error": "RuntimeError: illegal memory access"}
    assert found["before"]["process"] != found["behind"]["process"]


def test_a_part_that_does_not_start_says_so(gpu, tmp_path):
    module(tmp_path, "broken", "raise ImportError('no such thing')")
    module(tmp_path, "skipping", "def cases(book):\n    raise Skipped('no backend passed the self-test')\n")
    module(tmp_path, "good", GOOD)
    parts, well = run(gpu, tmp_path, {"a": ("broken", 60, 30), "b": ("skipping", 60, 30), "c": ("good", 60, 30)})
    assert parts["a"]["status"] == "failed: the process ended with status 1, before any case"
    assert parts["b"]["status"] == "skipped: no backend passed the self-test"
    assert (parts["c"]["status"], well) == ("done", False)


def test_a_second_run_resumes(gpu, tmp_path):
    body = """
    from pathlib import Path

    def once():
        if Path(__file__).with_name("ran").exists():
            return {"found": 2}
        Path(__file__).with_name("ran").touch()
        raise RuntimeError("not yet")

    def cases(book):
        return [Case("first", lambda: {"process": os.getpid()}), Case("second", once)]
    """
    module(tmp_path, "again", body)
    before, well = run(gpu, tmp_path, {"a": ("again", 60, 30)})
    assert not well
    after, well = run(gpu, tmp_path, {"a": ("again", 60, 30)}, resume=True)
    assert well
    assert after["a"]["results"]["first"] == before["a"]["results"]["first"]
    assert results(after["a"])["second"] == {"found": 2}


def test_the_limits_are_ten_minutes(gpu):
    _, table, _ = gpu
    assert table.BUILD_SECONDS + sum(part.seconds for part in table.PARTS.values()) <= table.MOST_SECONDS == 600
    assert all(part.case_seconds <= part.seconds for part in table.PARTS.values())


def test_what_is_lacking_is_named_in_one_sentence(tmp_path):
    """A Python without packages, and this one where no device is."""
    bare = [sys.executable, "-S", "-P", str(BENCH / "gpu.py"), "--json", str(tmp_path / "gpu.json")]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FUSEDMOE_BUILD")
    } | {"PYTHONPATH": str(BENCH)}
    said = subprocess.run(bare, capture_output=True, text=True, env=environment)
    assert said.returncode == 1
    assert said.stderr.strip().splitlines() == [
        f"gpu: expected torch, numpy, pytest, pybind11, setuptools in {sys.executable}, found none; install "
        f"them, or activate the environment that has them"
    ]


def test_a_machine_without_a_device_runs_nothing(tmp_path):
    command = [sys.executable, str(BENCH / "gpu.py"), "--json", str(tmp_path / "gpu.json")]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert said.returncode == 1
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith("gpu: expected a device, got a machine without one that PyTorch finds (")
    assert not (tmp_path / "gpu.json").exists()


# What a machine with a device may lack; `make gpu` may ask for none of it.
EXTRAS = (
    "rich",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pytest_benchmark",
    "hypothesis",
    "mypy",
    "ruff",
)


@pytest.mark.parametrize("part", ["gpu_first", "gpu_parity", "gpu_times", "gpu_shares", "gpu_tools", "gpu_tuning"])
def test_a_part_asks_for_no_package_beyond_the_necessary(part):
    program = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import {part}"
    result = subprocess.run([sys.executable, "-c", program], cwd=BENCH, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
