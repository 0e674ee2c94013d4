"""Threads that serve a frozen model while others freeze it, thaw it and write to it."""

import sys
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.nn import frozen as freezing
from fusedmoe.nn.frozen import Frozen

from .test_freeze import frozen_layer, is_frozen, weight

THREADS = 8


def when(monkeypatch, owner, name: str, act) -> None:
    """Let another thread act once, right before a function is called for the first time."""
    function, done = getattr(owner, name), []

    def acted(*args, **kwargs):
        if not done:
            done.append(True)
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, acted)


def refrozen(model: nn.Module) -> None:
    fusedmoe.unfreeze(model)
    assert fusedmoe.freeze(model)


STEPS = {"looked at": "holds", "run": "run"}
ACTS = {
    "unfrozen": fusedmoe.unfreeze,
    "frozen anew": fusedmoe.freeze,
    "unfrozen and frozen": refrozen,
    "unfused": fusedmoe.unfuse,
    "written to": lambda model: weight(model).copy_(weight(model).clone()),
}


@pytest.mark.filterwarnings("ignore:.*no longer frozen")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("step", STEPS)
def test_a_call_goes_on_when_another_thread_acts_in_its_middle(step, act, monkeypatch):
    model, x = frozen_layer()
    expected = model(x)
    when(monkeypatch, Frozen, STEPS[step], lambda: ACTS[act](model))
    assert torch.equal(model(x), expected)
    # Not fused, it sums in another order.
    assert testing.error(model(x), expected) <= testing.bound(0.0, expected, torch.float32)


def test_a_call_looks_at_the_state_once():
    """Here a second look would find it thawed."""
    model, x = frozen_layer()
    expected = model(x)
    binding = model[0].forward.binding
    looks = [binding.frozen, None]

    class Flickering(type(binding)):
        frozen = property(lambda self: looks.pop(0), lambda self, value: None)

    state = binding.__dict__.pop("frozen")
    binding.__class__ = Flickering
    assert torch.equal(model(x), expected) and looks == [None] and state is not None


def test_what_another_thread_packed_anew_stays(monkeypatch):
    model, x = frozen_layer()
    weight(model).mul_(2)
    outdated = model[0].forward.binding.frozen
    holds = Frozen.holds

    def held(self):
        answer = holds(self)
        if self is outdated:
            fusedmoe.freeze(model)
        return answer

    monkeypatch.setattr(Frozen, "holds", held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(x)
        assert is_frozen(model) and torch.equal(model(x), out)


def test_threads_that_find_it_outdated_warn_once(monkeypatch):
    model, x = frozen_layer()
    weight(model).mul_(2)
    met = threading.Barrier(THREADS)
    holds = Frozen.holds

    def held(self):
        answer = holds(self)
        met.wait(60)
        return answer

    monkeypatch.setattr(Frozen, "holds", held)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outs = in_threads([lambda: model(x)] * THREADS)
    assert len([note for note in told if "no longer frozen" in str(note.message)]) == 1
    monkeypatch.undo()
    assert all(torch.equal(out, model(x)) for out in outs)


def test_a_parameter_replaced_while_it_is_packed_is_seen(monkeypatch):
    model, x = frozen_layer()
    fusedmoe.unfreeze(model)

    def replace() -> None:
        model[0].experts[0][1].mlp_net[0].weight = nn.Parameter(weight(model) * 2, requires_grad=False)

    # While they are packed, and right after each was looked up.
    for step in ("pack", "runner"):
        when(monkeypatch, freezing, step, replace)
        fusedmoe.freeze(model)
        with pytest.warns(UserWarning, match="no longer frozen"):
            out = model(x)
        assert torch.equal(model(x), out)


def test_a_step_of_an_optimizer_while_it_is_packed_is_seen(monkeypatch):
    model, x = frozen_layer()
    parameter = weight(model)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0, 0] = 1
    adam = torch.optim.Adam([parameter], lr=0.1, fused=True)

    def step_after(params, table):
        packed = pack(params, table)
        adam.step()
        return packed

    pack = freezing.pack
    monkeypatch.setattr(freezing, "pack", step_after)
    fusedmoe.freeze(model)
    with pytest.warns(UserWarning, match="no longer frozen"):
        model(x)


def in_threads(functions) -> list:
    """Run functions in threads of their own; raise what one raises."""
    results, errors = [], []

    def run(function) -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def short_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("short_switches")
@pytest.mark.filterwarnings("ignore:.*no longer frozen")
def test_serving_while_others_freeze_thaw_step_and_write():
    model, x = frozen_layer()
    expected = model(x)
    end = time.monotonic() + 3
    parameter = weight(model)
    sgd = torch.optim.SGD([parameter], lr=0.0)

    def repeat(act):
        def run() -> int:
            count = 0
            while time.monotonic() < end or count == 0:
                act()
                count += 1
            return count

        return run

    def serve() -> None:
        assert torch.equal(model(x), expected)

    # Values stay what they are: a write that is half done is no fault of ours.
    acts = [
        lambda: fusedmoe.freeze(model),
        lambda: fusedmoe.unfreeze(model),
        lambda: parameter.add_(0),
        lambda: fusedmoe.describe(model),
        sgd.step,
        *[serve] * 4,
    ]
    assert min(in_threads([repeat(act) for act in acts])) > 0
    fusedmoe.freeze(model)
    serve()
    assert is_frozen(model)
