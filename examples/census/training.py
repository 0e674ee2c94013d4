"""Train the same model twice, side by side: one arm as its author wrote it, the other after
`fusedmoe.fuse`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fusedmoe
from fusedmoe.demo.dataset import Dataset, Part
from fusedmoe.demo.model import TabularModel, loss_of
from fusedmoe.functional import fusion_network
from fusedmoe.nn.wiring import central

BATCH = 1024
LEARNING_RATE = 1e-3
# The first calls fill caches and memory pools; they are run and not counted.
WARM_UP = 5
INFERENCE_ROUNDS = 60


@dataclass
class Arm:
    """One of the two trainings: a model, its optimizer, and what was seen on the way."""

    name: str
    model: TabularModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    inference_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a training step: gradients zeroed, forward, loss, backward,
        optimizer.
        """
        return 1e3 * statistics.median(self.step_seconds[WARM_UP:] or self.step_seconds)

    @property
    def inference_ms(self) -> float:
        """Median milliseconds of a forward without gradients."""
        return 1e3 * statistics.median(self.inference_seconds[WARM_UP:] or self.inference_seconds)


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of the two arms, and the largest absolute value."""

    absolute: float
    scale: float


def make_arms(data: Dataset, family: str, seed: int) -> tuple[Arm, Arm]:
    """Build the model twice from `seed` and fuse the second one.

    Raises: RuntimeError with the reason if the second could not be fused.
    """
    arms = []
    for name in ("reference layers", "fused"):
        torch.manual_seed(seed)
        model = TabularModel(data, family)
        # The optimizer stands before `fuse`, which keeps every parameter object.
        arms.append(Arm(name, model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)))
    report = fusedmoe.fuse(arms[1].model)
    if not report.fused:
        raise RuntimeError(f"demo: expected the network to be fused, got\n{report}")
    return arms[0], arms[1]


def batches(data: Dataset, epochs: int, seed: int) -> Iterator[Part]:
    """Yield the training rows in batches of `BATCH`, shuffled anew in each epoch, the last
    incomplete batch left out.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH, len(data.train))
    for _ in range(epochs):
        order = torch.randperm(len(data.train), generator=generator)
        for first in range(0, len(order) - size + 1, size):
            yield data.train.rows(order[first : first + size])


def train_step(arm: Arm, batch: Part, binary: bool) -> None:
    """Run one timed training step."""
    start = time.perf_counter()
    arm.optimizer.zero_grad()
    loss = loss_of(arm.model(batch), batch, binary)
    loss.backward()
    arm.optimizer.step()
    arm.step_seconds.append(time.perf_counter() - start)
    arm.losses.append(loss.item())


def predict(model: TabularModel, part: Part) -> Tensor:
    """Return the outputs [N, T], computed in batches."""
    with torch.inference_mode():
        return torch.cat([model(part.rows(slice(first, first + BATCH))) for first in range(0, len(part), BATCH)])


def validate(arm: Arm, data: Dataset) -> None:
    """Note the loss of the validation part, and keep the weights if it is the lowest so far."""
    loss = loss_of(predict(arm.model, data.validation), data.validation, data.binary).item()
    if not arm.validation or loss < min(earlier for _, earlier in arm.validation):
        arm.best = {key: value.detach().clone() for key, value in arm.model.state_dict().items()}
    arm.validation.append((len(arm.losses), loss))


def train(arms: tuple[Arm, Arm], data: Dataset, steps: int, seed: int, tick: Callable[[], None]) -> None:
    """Train both arms on the same batches, one step each in turn, then return each to its best
    weights by validation loss.

    Whichever arm goes first finds the batch cold, so they take turns at that too. `tick` is called
    after each pair of steps.
    """
    per_epoch = max(1, len(data.train) // BATCH)
    for step, batch in zip(range(1, steps + 1), batches(data, -(-steps // per_epoch), seed), strict=False):
        for arm in arms if step % 2 else arms[::-1]:
            train_step(arm, batch, data.binary)
        if step % per_epoch == 0 or step == steps:
            for arm in arms:
                validate(arm, data)
        tick()
    for arm in arms:
        arm.model.load_state_dict(arm.best)


def time_inference(arms: tuple[Arm, Arm], data: Dataset, rounds: int, tick: Callable[[], None]) -> None:
    """Time forwards of one batch of the test part, the arms in turn."""
    with torch.inference_mode():
        for number in range(rounds):
            first = number * BATCH % max(1, len(data.test) - BATCH)
            batch = data.test.rows(slice(first, first + BATCH))
            for arm in arms if number % 2 else arms[::-1]:
                start = time.perf_counter()
                arm.model(batch)
                arm.inference_seconds.append(time.perf_counter() - start)
            tick()


def outputs_and_gradients(model: TabularModel, batch: Part, binary: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs [N, T] of a batch, and by name the gradients of its loss."""
    model.zero_grad()
    outputs = model(batch)
    loss_of(outputs, batch, binary).backward()
    return outputs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(plain: TabularModel, data: Dataset) -> tuple[Difference, Difference]:
    """Return how far outputs and gradients of a fused copy are from those of `plain`, at the same
    weights on the same batch.

    Raises: RuntimeError if a parameter has a gradient in one of them only.
    """
    batch = data.test.rows(slice(0, BATCH))
    fused = copy.deepcopy(plain)
    fusedmoe.fuse(fused)
    expected, expected_grads = outputs_and_gradients(copy.deepcopy(plain), batch, data.binary)
    outputs, grads = outputs_and_gradients(fused, batch, data.binary)
    if expected_grads.keys() != grads.keys():
        alone = sorted(expected_grads.keys() ^ grads.keys())
        raise RuntimeError(f"demo: expected gradients for the same parameters, got {alone} for one arm only")
    worst = max((grads[name] - expected_grads[name]).abs().max().item() for name in grads)
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    return Difference((outputs - expected).abs().max().item(), expected.abs().max().item()), Difference(worst, largest)


def mixing_weights(model: TabularModel, part: Part) -> list[Tensor]:
    """Return the mixing weights [U, E] of each level, averaged over the rows of `part`."""
    table, keys = central(model.network)
    params = [model.network.get_parameter(key) for key in keys]
    sums = [torch.zeros(len(level.units), len(level.experts), dtype=torch.float64) for level in table.levels]
    with torch.inference_mode():
        for first in range(0, len(part), BATCH):
            x = model.inputs(part.rows(slice(first, first + BATCH)))
            _, weights = fusion_network(x, params, table, return_mixing_weights=True)
            for total, weight in zip(sums, weights, strict=True):
                total += weight.sum(0)
    return [total / len(part) for total in sums]
