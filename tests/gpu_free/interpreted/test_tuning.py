"""FUSEDMOE_AUTOTUNE: every candidate is right, the fastest is kept and read again, and nothing of
it happens unless it is asked for.

There is no device here: the interpreter stands for one, and a test's own clock for its events.
"""

import json
import re
from functools import partial
from threading import Thread

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fusedmoe.kernels import device, tiles
from fusedmoe.kernels.lowering import lower
from fusedmoe.kernels.triton import step, tuning
from fusedmoe.op import fusion_network
from fusedmoe.table import Table
from fusedmoe.testing import Case, assert_close, build, evaluate, expectation, problem

# Wider than a tile of 16 columns, with hidden layers and towers; and what only has to run.
WIDE = build("adatt_sp", 18, [[20, 17], [18]], 2, 1, activation="silu", towers=(3, 1))
TABLE = build("adatt_sp", 6, [[5]], 2, 1, activation="silu")
NETWORK = partial(fusion_network, backend="triton", return_mixing_weights=True)
ROWS = 20


def given_of(rows: int = ROWS, dtype: torch.dtype = torch.float32, table: Table = TABLE):
    return problem(Case(table, rows), dtype)


class Clock:
    """In place of `tuning.milliseconds`: tells the time that a test has set for the tiles of a
    call, which it makes where the test wants that."""

    def __init__(self):
        self.timed: list[tiles.Tiles] = []
        self.of: dict[tiles.Tiles, float] = {}
        self.calls = False

    def __call__(self, call) -> float:
        (one,) = call.args
        if self.calls:
            call()
        self.timed.append(one)
        return self.of.get(one, 1.0)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Tuning asked for, in a folder of its own, on the interpreter as a device."""
    clock = Clock()
    monkeypatch.setenv("FUSEDMOE_AUTOTUNE", "1")
    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TIMED_DEVICES", ("cpu",))
    monkeypatch.setattr(tuning, "milliseconds", clock)
    forget()
    yield clock
    forget()


def forget() -> None:
    """As a process that starts."""
    tuning._CHOSEN.clear()
    tuning.enabled.cache_clear()


def candidates_of(table: Table, dtype: torch.dtype, rows: int, backward: bool) -> tuple[tiles.Tiles, ...]:
    return tuning.candidates(lower(table), dtype, tiles.power_of_two(rows), "cpu", backward)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def infer(given) -> torch.Tensor:
    with torch.no_grad():
        return fusion_network(given.x, given.params, given.table, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("rows", [ROWS, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", range(len(candidates_of(WIDE, torch.float32, ROWS, True))))
def test_candidates_are_right(number, rows, dtype, monkeypatch):
    """Forward and backward each with a candidate of its own: the backward reads what the forward's
    tiles left."""
    several = candidates_of(WIDE, dtype, rows, True)
    monkeypatch.setattr(tuning, "of_forward", lambda *_: several[number % len(several)])
    monkeypatch.setattr(tuning, "of_backward", lambda *_: several[-1 - number % len(several)])
    given = given_of(rows, dtype, WIDE)
    assert_close(evaluate(NETWORK, given), expectation(given))


@pytest.mark.parametrize("rows", [1, 256, 512, 4096])
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_are_few_and_neighbours(rows, backward):
    first, *others = candidates_of(WIDE, torch.bfloat16, rows, backward)
    shipped = tiles.choose(lower(WIDE), torch.bfloat16, rows, "cpu")
    assert first == (shipped.backward if backward else shipped)
    assert 6 <= len(others) <= 12 and len({first, *others}) == 1 + len(others)
    # The other form, and the tiles of one launch in a launch a level.
    assert others[0].whole != first.whole
    assert others[1].rows == 16 and not others[1].whole
    near = others[2:]
    assert all(sum(a != b for a, b in zip(one, first, strict=True)) == 1 for one in near)


def test_the_fastest_is_kept_on_disk_and_read_again(clock, monkeypatch, tmp_path):
    given = given_of()
    forward, backward = (candidates_of(TABLE, torch.float32, ROWS, part) for part in (False, True))
    fastest = next(one for one in backward if one not in forward)
    clock.of = {forward[1]: 0.5, fastest: 0.25}
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]

    def step() -> None:
        torch.autograd.grad(fusion_network(x, params, TABLE, "triton"), [x, *params], given.d_out)

    step()
    assert clock.timed == [*forward, *backward]
    assert list(tuning._CHOSEN.values()) == [forward[1], fastest]
    before = dict(tuning._CHOSEN)
    assert len(files(tmp_path)) == 2
    step()
    forget()
    step()
    assert len(clock.timed) == len(forward) + len(backward) and before == tuning._CHOSEN


def test_a_file_tells_its_key_and_all_times(clock, tmp_path):
    infer(given_of())
    (name,) = files(tmp_path / "cache")
    found = json.loads((tmp_path / "cache" / name).read_text())
    (key,) = tuning._CHOSEN
    assert found["key"] == key._asdict() and len(found["milliseconds"]) == len(clock.timed)


def other_call(what: str, monkeypatch) -> None:
    """A call that differs from that of `infer(given_of())` in one part of the key."""
    given = given_of()
    if what == "rows":
        given = given_of(40)
    elif what == "dtype":
        given = given_of(dtype=torch.float16)
    elif what == "table":
        given = given_of(table=build("adatt_sp", 6, [[5]], 2, 2, activation="silu"))
    elif what == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    elif what == "slots":
        given = given._replace(x=given.x[:, :1].expand(-1, 2, -1))
    elif what == "arch":
        monkeypatch.setattr(device, "architecture", lambda _: "sm_120")
    elif what == "device":
        monkeypatch.setattr(tuning, "_device", lambda _: "another")
    elif what == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "9.9")
    elif what == "kernels":
        monkeypatch.setattr(tuning, "_sources", lambda: "others")
    with torch.set_grad_enabled(what == "work"):
        x = given.x.requires_grad_(what == "work")
        fusion_network(x, given.params, given.table, "triton", return_mixing_weights=what == "mixing")


# Products of 16 bits have one precision.
CHANGED = {"dtype": ["dtype", "precision"]}


@pytest.mark.parametrize("what", [name for name in tuning.Key._fields if name != "align"])
def test_each_part_of_a_key_makes_a_choice_of_its_own(what, clock, monkeypatch, tmp_path):
    infer(given_of())
    other_call(what, monkeypatch)
    first, second = tuning._CHOSEN
    assert [name for name, a, b in zip(tuning.Key._fields, first, second, strict=True) if a != b] == CHANGED.get(
        what, [what]
    )
    assert len(files(tmp_path)) == 2


def test_alignment_is_part_of_a_key(clock):
    """Parameters at odd addresses are read number by number, which other tiles may suit."""
    given = given_of(8, table=build("mmoe", 32, [[16]], 2, 1))
    infer(given)
    odd = torch.empty(given.x.numel() + 1)[1:].view_as(given.x).copy_(given.x)
    infer(given._replace(x=odd))
    assert [key.align for key in tuning._CHOSEN] == [4, 1]


def test_neighbouring_batches_share_a_choice(clock):
    for rows in (17, 20, 32):
        infer(given_of(rows))
    assert [key.rows for key in tuning._CHOSEN] == [32]


BAD = {
    "half a file": ('{"key": {', "JSONDecodeError"),
    "no object": ("[1]", "TypeError"),
    "of another key": ('{"key": {"work": "inference"}, "tiles": {}}', "ValueError: the key"),
    "no tiles": (None, "TypeError"),
    "tiles that are no candidate": (None, "ValueError: Tiles.*which is no candidate"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_spoilt_is_named_and_tuned_again(name, clock, tmp_path):
    infer(given_of())
    (path,) = (tmp_path / "cache").iterdir()
    found = json.loads(path.read_text())
    found["tiles"] = {"rows": 64} if name == "no tiles" else {**found["tiles"], "rows": 1}
    path.write_text(BAD[name][0] or json.dumps(found))
    count = len(clock.timed)
    forget()
    with pytest.warns(
        UserWarning,
        match=(
            f"{re.escape(str(path))}: expected tiles that an earlier run found the fastest, got "
            f"{BAD[name][1]}.*; tuned again"
        ),
    ):
        infer(given_of())
    assert len(clock.timed) == 2 * count
    forget()
    infer(given_of())
    assert len(clock.timed) == 2 * count


def test_a_folder_that_cannot_be_written_is_named(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning) as caught:
        infer(given_of())
    assert [("expected a file that can be written" in str(one.message)) for one in caught] == [False, True]
    infer(given_of())


def test_several_at_once_leave_one_whole_file(clock, tmp_path):
    infer(given_of())
    ((key, best),) = tuning._CHOSEN.items()
    several = candidates_of(TABLE, torch.float32, ROWS, False)
    found = []

    def write_and_read() -> None:
        for _ in range(50):
            tuning._write(key, best, {best: 1.0})
            found.append(tuning._read(key, several))

    threads = [Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [best] * 200 and len(files(tmp_path)) == 1


class _Refusing:
    """A kernel that raises an error for blocks of 32 rows."""

    def __init__(self, kernel, error: Exception):
        self.kernel, self.error = kernel, error

    def __getitem__(self, grid):
        def launch(*values, **named):
            if named["BLOCK_B"] == 32:
                raise self.error
            self.kernel[grid](*values, **named)

        return launch


ERRORS = [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_does_not_fit_the_device_is_left_out(error, clock, monkeypatch):
    monkeypatch.setattr(step, "forward_kernel", _Refusing(step.forward_kernel, error))
    several = candidates_of(TABLE, torch.float32, ROWS, False)
    clock.calls = True
    out = infer(given_of())
    assert set(several) - set(clock.timed) == {one for one in several if one.rows == 32} != set()
    monkeypatch.undo()
    assert torch.equal(out, infer(given_of()))


def test_shipped_tiles_that_do_not_fit_raise(clock, monkeypatch):
    monkeypatch.setattr(step, "forward_kernel", _Refusing(step.forward_kernel, ERRORS[0]))
    several = [one for one in candidates_of(TABLE, torch.float32, ROWS, False) if one.rows == 32]
    monkeypatch.setattr(tuning, "candidates", lambda *_: several)
    clock.calls = True
    with pytest.raises(OutOfResources):
        infer(given_of())


def test_a_graph_that_is_captured_takes_what_is_known(clock, monkeypatch):
    """The warm-up's choice, or the shipped one, and never the clock."""
    given = given_of()
    with monkeypatch.context() as shipped:
        shipped.setattr(tuning, "enabled", lambda: False)
        infer(given)
    monkeypatch.setattr(device, "capturing", lambda _: True)
    infer(given)
    assert clock.timed == [] and tuning._CHOSEN == {}
    monkeypatch.setattr(device, "capturing", lambda _: False)
    infer(given)
    monkeypatch.setattr(device, "capturing", lambda _: True)
    count = len(clock.timed)
    infer(given)
    assert count > 0 and len(clock.timed) == count


def test_a_compiled_call_takes_the_shipped_tiles(clock):
    given = given_of()
    compiled = torch.compile(
        lambda x: fusion_network(x, given.params, TABLE, "triton"), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        compiled(given.x)
    assert clock.timed == []


@pytest.mark.parametrize("value", [None, "0"])
def test_off_unless_it_is_asked_for(value, clock, monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDMOE_AUTOTUNE")
    if value:
        monkeypatch.setenv("FUSEDMOE_AUTOTUNE", value)
    monkeypatch.setattr(tuning, "folder", lambda: pytest.fail("expected no look at the disk"))
    evaluate(NETWORK, given_of())
    assert clock.timed == [] and files(tmp_path) == []


def test_another_value_is_refused(clock, monkeypatch):
    monkeypatch.setenv("FUSEDMOE_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FUSEDMOE_AUTOTUNE: expected 0 or 1, got 'yes'"):
        infer(given_of())


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDMOE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "fusedmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.folder().parts[-2:] == (".cache", "fusedmoe")
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "home", homeless)
        with pytest.raises(RuntimeError, match="FUSEDMOE_CACHE_DIR: expected a folder for tuned tiles"):
            tuning.folder()
    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path / "own"))
    assert tuning.folder() == tmp_path / "own"
