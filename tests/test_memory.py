"""Gradients live in recycled memory, and behave as any fresh tensor does."""

import copy
import io
import itertools
import threading

import pytest
import torch
from torch import multiprocessing

from fusedmoe import _C
from fusedmoe.families import adatt_sp, single_task
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, problem

# Weights of 128 KB and 64 KB, which have blocks of their own, and small gradients, which share one.
TABLE = adatt_sp(256, [[128], [128]], 2, 1)
SMALL, MOST_FREE = 64 << 10, 256 << 20
# Of the recycling itself: with torch 2.10, which the package supports too, results are torch's own.
# CI runs a later torch, and none of these skips.
recycled = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch 2.10 cannot make a tensor of memory that is not its own",
)


def step(given) -> list[torch.Tensor]:
    """The leaves of one training step, with their gradients."""
    leaves = [t.detach().requires_grad_() for t in (given.x, *given.params)]
    fusion_network(leaves[0], leaves[1:], TABLE, "cpu").backward(given.d_out)
    return leaves


@pytest.fixture
def given():
    return problem(Case(TABLE, 24), torch.float32)


def test_every_gradient_has_a_storage_of_its_own(given):
    grads = [leaf.grad for leaf in step(given)]
    for grad in grads:
        assert grad._base is None and grad.storage_offset() == 0 and grad.is_contiguous() and not grad.requires_grad
        assert grad.untyped_storage().nbytes() == grad.nbytes
        assert grad.data_ptr() % 64 == 0
    begins = sorted((grad.data_ptr(), grad.nbytes) for grad in grads)
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(begins))


@recycled
def test_the_next_step_takes_the_memory_of_the_last(given):
    places = []
    for _ in range(4):
        leaves = step(given)
        places.append(sorted(leaf.grad.data_ptr() for leaf in leaves))
        del leaves
    assert places[1] == places[2] == places[3]


def test_a_gradient_that_is_kept_is_not_written_to(given):
    kept, before = [], []
    for number in range(5):
        grads = [leaf.grad for leaf in step(given._replace(d_out=given.d_out * (number + 1)))]
        kept += grads[number::5]
        before += [grad.clone() for grad in grads[number::5]]
        del grads
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@recycled
def test_one_small_gradient_keeps_little(given):
    step(given)
    free = _C.free_bytes()
    bias = step(given)[2].grad
    assert bias.nbytes < 1024 and free - _C.free_bytes() == SMALL
    del bias
    assert _C.free_bytes() == free


@recycled
def test_what_lies_free_is_bounded():
    """What three calls keep for backward, more than 100 MB each, does not stay when all three are
    gone."""
    table = single_task(1, [[256]], 1)
    params = [torch.zeros(p.shape) for p in table.parameters]
    kept = [
        torch.ops.fusedmoe.network_cpu(torch.zeros(110_000, 1, 1), params, table.text, True, False, None)[2]
        for _ in range(3)
    ]
    assert all(saved.nbytes > MOST_FREE / 3 for saved in kept)
    while kept:
        kept.pop()
        assert _C.free_bytes() <= MOST_FREE


def test_gradients_can_be_copied_pickled_and_changed(given):
    plain = [leaf.grad.clone() for leaf in step(given)]
    for grad, value in zip([leaf.grad for leaf in step(given)], plain, strict=True):
        file = io.BytesIO()
        torch.save(grad, file)
        assert file.tell() < grad.nbytes + 4096
        file.seek(0)
        assert torch.equal(torch.load(file), value) and torch.equal(copy.deepcopy(grad), value)
        assert (grad.numpy() == value.numpy()).all()
        grad.mul_(2).add_(1)
        assert torch.equal(grad, value * 2 + 1)
        assert grad.resize_(1).shape == (1,)
        grad.set_(value)
        assert torch.equal(grad, value)
    leaves = step(given)
    for leaf, value in zip(leaves, plain, strict=True):
        leaf.grad.data = value.clone()
        leaf.grad.share_memory_()
        assert leaf.grad.is_shared() and torch.equal(leaf.grad, value)


def _double(queue, done):
    queue.get().mul_(2)
    done.set()


def test_gradients_can_be_shared_with_another_process(given):
    context = multiprocessing.get_context("fork")
    grad = step(given)[3].grad
    value = grad.clone()
    queue, done = context.Queue(), context.Event()
    process = context.Process(target=_double, args=(queue, done))
    process.start()
    queue.put(grad)
    assert done.wait(60)
    process.join()
    assert torch.equal(grad, value * 2)


def test_accumulation_and_optimizers(given):
    """The same parameters after five steps, whether gradients are dropped or zeroed between them,
    as with copies of the gradients."""

    def train(to_none: bool, clone: bool) -> list[torch.Tensor]:
        params = [p.clone().requires_grad_() for p in given.params]
        optimizer = torch.optim.Adam(params, 1e-2)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            for _ in range(2):
                fusion_network(given.x, params, TABLE, "cpu").backward(given.d_out)
            if clone:
                for p in params:
                    p.grad = p.grad.clone()
            optimizer.step()
        return [p.detach() for p in params]

    expected = train(True, True)
    for to_none in (True, False):
        assert all(torch.equal(a, b) for a, b in zip(train(to_none, False), expected, strict=True))


def test_threads_do_not_share_a_block(given):
    expected = [leaf.grad for leaf in step(given)]
    faults = []

    def work():
        for _ in range(50):
            if not all(torch.equal(leaf.grad, grad) for leaf, grad in zip(step(given), expected, strict=True)):
                faults.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
