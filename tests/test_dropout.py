"""Dropout: Philox's words, the same mask on every backend, its share, its gradients, and that it is
off outside of training."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedmoe.activation import DEFAULT_PARAMETER, Activation
from fusedmoe.op import fusion_network
from fusedmoe.parts import Dropout, Expert, Gate, Input, LayerNorm, Level, Linear, PReLU, Task, Unit, from_slots
from fusedmoe.reference import operator as reference
from fusedmoe.reference import philox
from fusedmoe.table import Table
from fusedmoe.testing import assert_close, evaluate, expectation

from .random_grammar import Grammar
from .random_tables import start
from .test_grammar import DRAWS, DTYPES, FUSED, GPU, on, same

BACKENDS = FUSED
SEED = 7


def seeded(network):
    """The network, with the same seed drawn at every call."""

    def run(*arguments, **options):
        torch.manual_seed(SEED)
        return network(*arguments, training=True, **options)

    return run


def by_reference(x, params, table):
    torch.manual_seed(SEED)
    return reference.forward(x, params, table, seed=philox.draw_seed(x.device))


def of_ops(*ops) -> Table:
    """One expert with these ops, which a unit and a tower with dropout hand on."""
    gate = Gate((from_slots(0),), (0,), (Linear(5), Activation("relu"), Dropout(0.2)))
    level = Level((Expert(from_slots(0), ops),), (Unit(gate),))
    return Table((Input(1, 6),), (level,), (Task(from_slots(0), (Linear(4), Dropout(0.25))),))


STAGES = {
    **{name: (Linear(7), Activation(name), Dropout(0.3)) for name in DEFAULT_PARAMETER},
    "alone": (Dropout(0.5),),
    "twice": (Dropout(0.5), Dropout(0.1)),
    "of a norm": (LayerNorm(), Dropout(0.3)),
    "of PReLU": (Linear(7), PReLU(True), Dropout(0.3), Linear(7), Activation("tanh")),
}


# Counters and keys of Random123's table of known answers.
@pytest.mark.parametrize(
    ("seed", "row", "column", "stream", "word"),
    [(0, 0, k, 0, word) for k, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))]
    + [
        (-1, -1, k, 0xFFFFFFFF, word)
        for k, word in zip(
            range(4 * 0xFFFFFFFF, 4 * 0xFFFFFFFF + 4), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), strict=True
        )
    ],
)
def test_known_answers(seed, row, column, stream, word):
    numbers = [torch.tensor([value]) for value in (seed, row, column)]
    assert int(philox.words(*numbers, stream)) == word


def test_the_share_that_is_dropped_and_that_streams_differ():
    like = torch.zeros(1000, 100, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        first, second = (philox.factors(torch.tensor([3]), like, p, stream) for stream in (0, 1))
        for found in (first, second):
            # 100,000 draws: six standard deviations.
            assert abs(float((found == 0).double().mean()) - p) < 6 * (p * (1 - p) / 1e5) ** 0.5
            assert float(found.max()) == 1 / (1 - p)
        assert abs(float(((first == 0) & (second == 0)).double().mean()) - p * p) < 6 * (p * p / 1e5) ** 0.5


def test_a_row_keeps_its_mask_however_many_there_are():
    seed = torch.tensor([11])
    few, many = (philox.factors(seed, torch.zeros(rows, 10), 0.5, 2) for rows in (5, 70))
    assert torch.equal(few, many[:5])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", ["relu", "sigmoid", "gelu", "of a norm", "of PReLU"] if GPU else STAGES)
def test_every_backend_drops_the_same(stage, backend, dtype):
    given = start(of_ops(*STAGES[stage]), 37, dtype)
    ours = evaluate(seeded(on(backend)), given)
    assert_close(ours, expectation(given, by_reference))
    again = evaluate(seeded(partial(on(backend), recompute=True)), given)
    assert [name for name in ours if not same(ours[name], again[name])] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", DRAWS)
def test_dropout_anywhere_in_a_table(seed, backend):
    given = start(Grammar(seed).table(), 11, torch.float32, seed)
    assert_close(evaluate(seeded(on(backend)), given), expectation(given, by_reference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_off_outside_of_training_and_for_p_0(backend):
    given = start(of_ops(*STAGES["silu"]), 9, torch.float32)
    without = start(of_ops(Linear(7), Activation("silu"), Dropout(0.0)), 9, torch.float32).table
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    plain = fusion_network(given.x, given.params, given.table, backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(plain, fusion_network(given.x, given.params, without, backend))
    assert not torch.equal(plain, fusion_network(given.x, given.params, given.table, backend, training=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generator_that_is_set_again_gives_the_same_call(backend):
    given = start(of_ops(*STAGES["gelu"]), 9, torch.float32)
    call = partial(fusion_network, given.x, given.params, given.table, backend, training=True)
    first, second = seeded(lambda training: call())(), call()
    assert torch.equal(first, seeded(lambda training: call())())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_draws_the_same_seed_again(backend, reentrant):
    given = start(of_ops(*STAGES["relu"]), 9, torch.float32)
    x = given.x.requires_grad_()

    def call(x):
        return fusion_network(x, given.params, given.table, backend, training=True)

    torch.manual_seed(SEED)
    (plain,) = torch.autograd.grad(call(x).sum(), x)
    torch.manual_seed(SEED)
    (again,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=reentrant).sum(), x) if not reentrant else (None,)
    if reentrant:
        checkpoint(call, x, use_reentrant=True).sum().backward()
        again = x.grad
    assert torch.equal(plain, again)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_second_derivatives(backend):
    given = start(of_ops(Linear(4), Activation("tanh"), Dropout(0.4)), 3, torch.float64)
    inputs = [given.x.requires_grad_(), *(p.requires_grad_() for p in given.params)]

    def call(x, *params):
        torch.manual_seed(SEED)
        return fusion_network(x, params, given.table, backend, training=True)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_with_any_number_of_threads(threads):
    given = start(of_ops(*STAGES["relu"]), 700, torch.float32)
    before = torch.get_num_threads()
    plain = evaluate(seeded(on("cpu")), given)
    torch.set_num_threads(threads)
    try:
        again = evaluate(seeded(on("cpu")), given)
    finally:
        torch.set_num_threads(before)
    assert all(same(plain[name], again[name]) for name in plain)
