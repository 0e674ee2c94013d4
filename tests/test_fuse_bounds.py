"""What `fuse` may cost, and what it leaves behind: no second copy of what a layer only holds, no
counting up to a lie, no global state changed."""

import contextlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import families
from fusedmoe.adapters import Unfusable, extent
from fusedmoe.nn import counts, wiring
from fusedmoe.reference import layers

from .swap_cases import WIDTHS, D, T, everything, smooth_layer


class Holding(layers.AdaTTSp):
    """A layer that holds something beside, which its forward does not read."""

    def __init__(self):
        super().__init__(D, WIDTHS, T, 2, activation="silu")


class Slotted:
    """An object without a dict."""

    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


@pytest.fixture(autouse=True)
def adapter():
    """Teach the wiring of `Holding`, of which anything beside keeps the built-in adapter away."""
    unregister = fusedmoe.register_adapter(
        lambda module: wiring.adatt_sp(smooth_layer()) if isinstance(module, Holding) else None
    )
    yield
    unregister()


NUMBERS = (1 << 22) + 1
BYTES = 4 * NUMBERS


def unregistered(module):
    # In a list PyTorch does not find it.
    module.others = [nn.ModuleDict({"table": nn.Embedding(NUMBERS, 1)})]


# What is held, and the name under which it is declined.
HELD = {
    "a parameter": (lambda module: module.register_parameter("table", nn.Parameter(torch.zeros(NUMBERS))), "table"),
    "a buffer": (lambda module: module.register_buffer("table", torch.zeros(NUMBERS)), "table"),
    "a buffer of a submodule": (
        lambda module: module.experts[0][1].register_buffer("table", torch.zeros(NUMBERS)),
        r"experts\.0\.1\.table",
    ),
    "a submodule": (lambda module: setattr(module, "table", nn.Embedding(NUMBERS, 1)), r"table\.weight"),
    "a tensor": (lambda module: setattr(module, "table", torch.zeros(NUMBERS)), "table"),
    "a small view of a large tensor": (lambda module: setattr(module, "table", torch.zeros(NUMBERS)[:1]), "table"),
    "tensors in a dict": (
        lambda module: setattr(module, "tables", {i: [torch.zeros(NUMBERS // 4)] for i in range(5)}),
        "tables",
    ),
    "a tensor in an object": (lambda module: setattr(module, "held", Slotted(torch.zeros(NUMBERS))), "held"),
    "a module in a list": (unregistered, "others"),
    "an array": (lambda module: setattr(module, "table", np.zeros(NUMBERS, np.float32)), "table"),
    "a view of an array": (lambda module: setattr(module, "table", np.zeros(NUMBERS, np.float32)[:]), "table"),
    "bytes": (lambda module: setattr(module, "table", bytearray(BYTES)), "table"),
    "a list": (lambda module: setattr(module, "table", [0] * NUMBERS), "table"),
}


@contextlib.contextmanager
def no_copies(monkeypatch, most: int):
    """Let no tensor be copied, and none made that has more than so many numbers."""
    for name in ("clone", "__deepcopy__"):
        function = getattr(torch.Tensor, name)

        def checked(self, *args, _function=function, **kwargs):
            assert self.numel() <= most, f"a tensor of {self.numel()} numbers was copied"
            return _function(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, checked)
    draw = torch.randn

    def drawn(shape, *args, **kwargs):
        assert torch.Size(shape).numel() <= most
        return draw(shape, *args, **kwargs)

    monkeypatch.setattr(torch, "randn", drawn)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("what", HELD)
def test_what_a_layer_holds_beside_its_table_is_not_copied(what, monkeypatch):
    module = Holding()
    hold, name = HELD[what]
    hold(module)
    before = everything(module)
    with no_copies(monkeypatch, 10_000):
        report = fusedmoe.fuse(module)
        told = fusedmoe.describe(module)
    assert not report and everything(module) == before
    for text in (str(report), told):
        with pytest.raises(
            AssertionError,
            match=(
                rf"{name}: expected at most 16,777,216 bytes in all beside the parameters of its table, got "
                rf"[1-9]\d,\d+,\d+ or more"
            ),
        ):
            raise AssertionError(text)


def test_many_objects_are_not_copied():
    module = Holding()
    module.names = [object() for _ in range(extent.MOST_OBJECTS + 1)]
    assert "names: expected at most 100,000 objects beside the parameters of its table" in str(fusedmoe.fuse(module))


def test_modest_things_are_no_obstacle():
    module = Holding()
    module.register_buffer("mask", torch.ones(1 << 20))
    module.names = [f"task {t}" for t in range(10_000)]
    # The same thing again and again is one; so are the parameters of the table, and the tree
    # itself.
    module.lists = [module.names] * 50_000
    module.own = (module.experts, list(module.parameters()))
    knot = []
    for _ in range(60):
        knot = [knot, knot]
    module.knot = knot
    module.knot.append(knot)
    assert fusedmoe.fuse(module), fusedmoe.describe(module)


def test_hooks_are_not_copied():
    module, table = Holding(), torch.zeros(NUMBERS)
    module.register_forward_hook(lambda *_: table.sum() and None)
    assert fusedmoe.fuse(module)


def test_the_parameters_of_the_table_may_be_large():
    layer = layers.SharedBottom(1 << 16, [80], 2)
    assert layer.bottom_projection.mlp_net[0].weight.numel() > NUMBERS and fusedmoe.fuse(layer)


PEAK = """
import resource, torch
from torch import nn
import fusedmoe
from tests.test_fuse_bounds import Holding
from fusedmoe.nn import wiring
from tests.swap_cases import smooth_layer
fusedmoe.register_adapter(lambda module: wiring.adatt_sp(smooth_layer()) if isinstance(module, Holding) else None)
fusedmoe.fuse(smooth_layer())
model = Holding()
model.table = nn.Embedding(1 << 21, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = fusedmoe.fuse(model)
assert "table.weight" in str(report), report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_table_takes_no_second_memory():
    grown = (
        int(
            subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=300).stdout
        )
        / 1024
    )
    # The table has 512 MiB.
    assert grown < 64


COUNTS = ("num_tasks", "num_experts", "num_task_experts", "num_shared_experts", "num_expert_list", "borrows")
LIES = {
    "a number": 10**9,
    "a large number": 10**30,
    "a range": range(10**9),
    "a list of large numbers": [10**9, 10**9, 10**9, 10**9],
    "ranges": [range(10**9)] * 3,
    "no number": "10",
    "a fraction": 1e9,
}
LYING = """
import resource, sys, torch
import fusedmoe
from tests.swap_cases import LAYERS
from tests.test_fuse_bounds import COUNTS, LIES
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for layer, (make, _) in LAYERS.items():
    for count in COUNTS:
        for lie, value in LIES.items():
            model = make()
            inner = getattr(model, "mtl_arch", model)
            if hasattr(inner, count):
                setattr(inner, count, value)
                report = fusedmoe.fuse(model)
                assert not [entry for entry in report.fused if entry.path == ""], (layer, count, lie, str(report))
                print(layer, count, lie)
"""


def test_counts_that_lie_are_declined_at_once():
    """In a process of its own, under a limit of memory and of time."""
    result = subprocess.run([sys.executable, "-c", LYING], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 200


# What a family takes behind the number of tasks.
REST = {
    "omoe": (2,),
    "mmoe": (2,),
    "ml_mmoe": (2,),
    "cgc": (1, 1),
    "ple": (1, 1),
    "adatt_sp": (2,),
    "adatt": (1, 1),
    "asymmetric_sharing": ([[0]],),
}


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=list(families.FAMILIES))
def test_families_refuse_absurd_counts_at_once(family):
    rest = REST.get(family.__name__, ())
    given = (*(), 4, [[3]])
    began = time.process_time()
    with pytest.raises(ValueError, match="expected at most 1048576, got 1000000000"):
        family(*given, 10**9, *rest)
    for place, count in enumerate(rest):
        if isinstance(count, int):
            arguments = [10**9 if i == place else other for i, other in enumerate(rest)]
            with pytest.raises(ValueError, match="expected at most 1048576, got"):
                family(*given, 3, *arguments)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=list(families.FAMILIES))
def test_which_families_have_one_unit_for_all_tasks(family):
    rest = {**REST, "asymmetric_sharing": ([[0], [1]],)}.get(family.__name__, ())
    assert families.one_unit_serves_all(family) == (len(family(4, [[3]], 2, *rest).levels[-1].units) == 1)


def test_tasks_that_share_one_unit_may_be_many_but_not_any_number():
    layer = layers.SharedBottom(D, [4], counts.MOST_SHARING)
    assert wiring.shared_bottom(layer).table.tasks
    layer.num_tasks += 1
    with pytest.raises(
        Unfusable, match="num_tasks: expected a number that fits the experts and gates there, at most 4096, got 4097"
    ):
        wiring.shared_bottom(layer)


def seeded_again():
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def drawn():
    random.random()
    np.random.random()
    torch.rand(1)


MEDDLING = {
    "seeds": seeded_again,
    "draws": drawn,
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: (
        torch.set_autocast_enabled("cpu", True),
        torch.set_autocast_dtype("cpu", torch.float16),
        torch.set_autocast_cache_enabled(False),
    ),
    "autocast of cuda": lambda: torch.set_autocast_enabled("cuda", True),
    "threads": lambda: torch.set_num_threads(3),
    "fill": lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
}


class Meddling(layers.AdaTTSp):
    """Changes global state after it has computed; fails afterwards where it is told to."""

    meddle = staticmethod(lambda: None)
    fails = False

    def forward(self, inputs):
        out = super().forward(inputs)
        type(self).meddle()
        if type(self).fails:
            raise KeyError("no")
        return out


def globals_of() -> dict:
    state = np.random.get_state()
    return {
        "random": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "context": torch.utils._device.CURRENT_DEVICE,
        "grad": torch.is_grad_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "cache": torch.is_autocast_cache_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def meddling():
    yield Meddling
    Meddling.meddle, Meddling.fails = staticmethod(lambda: None), False


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", MEDDLING)
def test_what_a_forward_changes_outside_is_put_back(what, fails, meddling):
    meddling.meddle, meddling.fails = staticmethod(MEDDLING[what]), fails
    layer = meddling(D, WIDTHS, T, 2)
    for call in (fusedmoe.fuse, fusedmoe.describe):
        before = globals_of()
        call(layer)
        after = globals_of()
        assert [name for name in before if before[name] != after[name]] == []


def test_state_that_was_set_before_stays_set(meddling):
    """Put back is what was there, not what is usual."""
    meddling.meddle = staticmethod(
        lambda: (torch.set_default_dtype(torch.float32), torch.use_deterministic_algorithms(False))
    )
    layer = meddling(D, WIDTHS, T, 2)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = globals_of()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            inside = globals_of()
            fusedmoe.fuse(layer)
            assert globals_of() == inside
        assert globals_of() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_what_a_copy_changes_outside_is_put_back():
    class Copied(Slotted):
        def __deepcopy__(self, memo):
            seeded_again()
            torch.set_default_dtype(torch.float64)
            return self

    layer = smooth_layer()
    layer.thing = Copied(None)
    before = globals_of()
    assert fusedmoe.fuse(layer)
    assert globals_of() == before
