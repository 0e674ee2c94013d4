"""Each family of multi-task networks is one function here, which returns its `Table`.

Arguments that mean the same in every family:

    input_width    D, the width of an input vector.
    expert_widths  one list per level: the widths of an expert's layers. [[256], [128]] is two
                   levels of one-layer experts, [[256, 128]] one level of two-layer experts.
    num_tasks      T, the number of tasks.
    activation     what follows every layer of an expert and every hidden layer of a gate or tower.
    towers         the widths of each task's tower; its last layer is linear. Empty: no towers.

T tasks, L levels, m_t experts of task t, m_s shared experts, own(t) and sh their indices, U units.
All functions raise ValueError, naming the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusedmoe.activation import Activation
from fusedmoe.activation import activation as activation_of
from fusedmoe.drafts import (
    counts_of,
    draft_of,
    experts_on,
    family,
    finish,
    ones,
    owned,
    owners,
    same_unit,
    see_all,
    share_input,
    without_shared_unit,
)
from fusedmoe.parts import Draft, Gate, Input, Level, Source, Static, Task, Unit, from_slots, mlp
from fusedmoe.table import Table
from fusedmoe.validation import (
    MOST_SLOTS,
    Widths,
    require_count_per_task,
    require_indices,
    require_integer,
    require_level_widths,
    require_one_level,
    require_sequence,
)

ROOT = ((Source("input"),),)


@family
def single_task(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Give each task a bottom of its own: out[t] = y[t].

    Returns: a table over x [B, 1, D] with output [B, T, H].
    Source: the single-task baseline of MMoE, section 6.1.
    """
    tasks = range(require_integer(num_tasks, "num_tasks", 1, MOST_SLOTS))
    level = Level(
        experts_on([0] * len(tasks), require_one_level(expert_widths), activation),
        tuple(Unit(static=ones((t,))) for t in tasks),
    )
    return finish(Draft((Input(1, input_width),), (level,)), activation, towers)


@family
def shared_bottom(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Hand one bottom to every task: out[t] = y[0].

    Returns: a table over x [B, 1, D] with one unit that all tasks read.
    Source: MMoE, equation 1.
    """
    level = Level(experts_on([0], require_one_level(expert_widths), activation), (Unit(static=ones((0,))),))
    return finish(Draft((Input(1, input_width),), (level,), same_unit(num_tasks)), activation, towers)


@family
def omoe(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_experts: int,
    gate_widths: Sequence[int] = (),
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Mix all experts once for all tasks: out[t] = sum over e of softmax(G x)[e] * y[e].

    Args:
        num_experts: n, the number of experts.
        gate_widths: the widths of the gate's hidden layers.
    Returns: a table over x [B, 1, D] with one unit that all tasks read.
    Source: MMoE, equation 5.
    """
    draft = draft_of(ml_mmoe)(
        input_width, [require_one_level(expert_widths)], 1, num_experts, [gate_widths], activation
    )
    return finish(draft, activation, towers, same_unit(num_tasks))


@family
def mmoe(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_experts: int,
    gate_widths: Sequence[int] = (),
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Mix all experts for each task: out[t] = sum over e of softmax(G[t] x)[e] * y[e].

    Args:
        num_experts: n, the number of experts.
        gate_widths: the widths of the gates' hidden layers.
    Returns: a table over x [B, 1, D] with output [B, T, H].
    Source: MMoE, equations 6 to 8.
    """
    return draft_of(ml_mmoe)(
        input_width, [require_one_level(expert_widths)], num_tasks, num_experts, [gate_widths], activation, towers
    )


@family
def ml_mmoe(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_experts: int,
    gate_widths: Widths = (),
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Stack levels of MMoE: expert e reads unit e of the level below, every gate reads x.

    Args:
        num_experts: n per level. There are n units below the last level, and T at the last.
        gate_widths: one list per level with the widths of the gates' hidden layers; empty: none.
    Returns: a table over x [B, 1, D] with output [B, T, H].
    Source: AdaTT, section 4.1; PLE, figure 1h.
    """
    levels = require_level_widths(expert_widths)
    count = require_integer(num_experts, "num_experts", 1, MOST_SLOTS)
    lists = require_sequence(gate_widths, "gate_widths", "one list of layer widths per level")
    hidden = [require_sequence(widths, "gate_widths") for widths in lists] or [()] * len(levels)
    if len(hidden) != len(levels):
        raise ValueError(f"gate_widths: expected one list for each of {len(levels)} levels, got {len(hidden)}")
    kind = activation_of(activation)
    stack = []
    for number, widths in enumerate(levels):
        gate = Gate(ROOT, tuple(range(count)), mlp(hidden[number], kind))
        units = require_integer(num_tasks if number == len(levels) - 1 else count, "num_tasks", 1, MOST_SLOTS)
        slots = range(count) if number else [0] * count
        stack.append(Level(experts_on(slots, widths, activation), (Unit(gate),) * units))
    return finish(Draft((Input(1, input_width),), tuple(stack)), activation, towers)


@family
def cgc(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_task_experts: int | Sequence[int],
    num_shared_experts: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Let each task mix its own and the shared experts by a gate on x: PLE of one level.

    Args: as `ple`.
    Returns: a table over x [B, 1, D] with output [B, T, H].
    Source: PLE, equations 2 to 5.
    """
    levels = [require_one_level(expert_widths)]
    draft = draft_of(ple)(input_width, levels, num_tasks, num_task_experts, num_shared_experts, activation, towers)
    return share_input(draft)


@family
def ple(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_task_experts: int | Sequence[int],
    num_shared_experts: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Let unit t mix own(t) and sh, and the shared unit all experts; each gate reads its own slot.

    Args:
        num_task_experts: m_t, one number for all tasks or a list of T; own(t) read slot t.
        num_shared_experts: m_s, 0 or more; sh read slot T. The rows of a gate are own(t), then sh.
    Returns: a table over x [B, T + 1, D], the shared slot last, with output [B, T, H].
    Source: PLE, equations 6 and 7.
    """
    levels = require_level_widths(expert_widths)
    own = owned(counts_of(num_tasks, num_task_experts, num_shared_experts))
    sees = [*(mine + own[-1] for mine in own[:-1]), tuple(range(sum(map(len, own))))]
    units = tuple(Unit(Gate((from_slots(u),), seen)) for u, seen in enumerate(sees))
    stack = tuple(Level(experts_on(owners(own), widths, activation), units) for widths in levels)
    return finish(
        Draft((Input(num_tasks + 1, input_width),), without_shared_unit(stack, num_tasks)), activation, towers
    )


@family
def adatt_sp(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_task_experts: int | Sequence[int],
    static_weights: bool = True,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Let unit t mix all experts with weights softmax(G[t] x[t]) + v[t], v only on its own experts.

    Args:
        num_task_experts: m_t, one number for all tasks or a list of T.
        static_weights: add static weights v: learned ([T, m] per level; flat if the m_t differ), or
            all ones if every m_t is 1.
    Returns: a table over x [B, T, D] with output [B, T, H].
    Source: AdaTT, equations 2 to 10.
    """
    levels = require_level_widths(expert_widths)
    counts = require_count_per_task(num_tasks, num_task_experts)
    own = owned(counts)
    shape = (num_tasks, counts[0]) if len(set(counts)) == 1 else (sum(counts),)

    def static(level: int, u: int) -> Static | None:
        if not static_weights:
            return None
        return ones(own[u]) if set(counts) == {1} else Static(own[u], tensor=level, offset=sum(counts[:u]))

    stack = tuple(see_all(own, level, widths, static, activation) for level, widths in enumerate(levels))
    statics = (shape,) * len(levels) if static_weights and set(counts) != {1} else ()
    return finish(Draft((Input(num_tasks, input_width),), stack, shared=statics), activation, towers)


@family
def adatt(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    num_task_experts: int | Sequence[int],
    num_shared_experts: int,
    static_weights: bool = True,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """As AdaTT-sp, with shared experts and a shared unit that owns them.

    Args:
        num_task_experts: m_t, one number for all tasks or a list of T.
        num_shared_experts: m_s, 0 or more; they read slot T.
        static_weights: add static weights v: learned ([L, m_t] per task and [L - 1, m_s] for the
            shared unit), or all ones if every m_t and m_s is 1.
    Returns: a table over x [B, T + 1, D], the shared slot last, with output [B, T, H].
    Source: AdaTT, section 3.2.
    """
    levels = require_level_widths(expert_widths)
    counts = counts_of(num_tasks, num_task_experts, num_shared_experts)
    own = owned(counts)

    def static(level: int, u: int) -> Static | None:
        # The shared unit has static weights for the levels where it exists: below the last.
        if not static_weights or (u == num_tasks and level == len(levels) - 1):
            return None
        return ones(own[u]) if set(counts) == {1} else Static(own[u], tensor=u, offset=level * counts[u])

    stack = tuple(see_all(own, level, widths, static, activation) for level, widths in enumerate(levels))
    shapes = (*((len(levels), m) for m in counts[:-1]), (len(levels) - 1, counts[-1]))
    statics = shapes if static_weights and set(counts) != {1} else ()
    return finish(
        Draft((Input(num_tasks + 1, input_width),), without_shared_unit(stack, num_tasks), shared=statics),
        activation,
        towers,
    )


@family
def cross_stitch(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Mix one expert per task with learned weights: out[u] = sum over e of v[u, e] * y[e].

    Returns: a table over x [B, T, D] with output [B, T, H]; v is a static tensor for each level.
    Source: Misra et al., CVPR 2016, equation 1.
    """
    levels = require_level_widths(expert_widths)
    tasks = tuple(range(require_integer(num_tasks, "num_tasks", 1, MOST_SLOTS)))
    stack = tuple(
        Level(
            experts_on(tasks, widths, activation),
            tuple(Unit(static=Static(tasks, tensor=level, offset=u * num_tasks)) for u in tasks),
        )
        for level, widths in enumerate(levels)
    )
    return finish(
        Draft((Input(num_tasks, input_width),), stack, shared=((num_tasks, num_tasks),) * len(levels)),
        activation,
        towers,
    )


@family
def asymmetric_sharing(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    borrows: Sequence[Sequence[int]],
    combine: str = "sum",
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Give each task a bottom; task t combines the bottoms y[e] for e in borrows[t].

    Args:
        borrows: one list of task indices per task; with its own index if it uses its own bottom.
        combine: "sum", "mean" or "concat".
    Returns: a table over x [B, 1, D] with output [B, T, H], or [B, T, n H] for "concat" of n.
    Source: PLE, section 3.2.
    """
    form = f"one list of tasks for each of {require_integer(num_tasks, 'num_tasks', 1, MOST_SLOTS)} tasks"
    sources = [require_sequence(tasks, "borrows", form) for tasks in require_sequence(borrows, "borrows", form)]
    if len(sources) != num_tasks:
        raise ValueError(f"borrows: expected {form}, got {len(sources)}")
    for t, tasks in enumerate(sources):
        require_indices(tasks, num_tasks, f"borrows, task {t}", "tasks", 1)
    if combine == "concat":
        draft = draft_of(single_task)(input_width, expert_widths, num_tasks, activation)
        return finish(draft, activation, towers, tuple(Task(from_slots(*tasks)) for tasks in sources))
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine: expected one of sum, mean, concat, got {combine!r}")
    units = tuple(
        Unit(static=Static(tasks, values=(1.0 if combine == "sum" else 1.0 / len(tasks),) * len(tasks)))
        for tasks in sources
    )
    level = Level(experts_on([0] * num_tasks, require_one_level(expert_widths), activation), units)
    return finish(Draft((Input(1, input_width),), (level,)), activation, towers)


@family
def customized_sharing(
    input_width: int,
    expert_widths: Widths,
    num_tasks: int,
    activation: str | Activation = "relu",
    towers: Sequence[int] = (),
) -> Draft:
    """Give each task a bottom of its own and a shared one, concatenated: out[t] = [y[t], y[T]].

    Returns: a table over x [B, 1, D] with T + 1 units, output [B, T, 2 H].
    Source: PLE, section 3.2.
    """
    shared = require_integer(num_tasks, "num_tasks", 1, MOST_SLOTS)
    draft = draft_of(single_task)(input_width, expert_widths, shared + 1, activation)
    return finish(draft, activation, towers, tuple(Task(from_slots(t, shared)) for t in range(shared)))


FAMILIES: dict[str, Callable[..., Table]] = {
    family.__name__: family
    for family in (
        single_task,
        shared_bottom,
        omoe,
        mmoe,
        ml_mmoe,
        cgc,
        ple,
        adatt_sp,
        adatt,
        cross_stitch,
        asymmetric_sharing,
        customized_sharing,
    )
}


def one_unit_serves_all(family: Callable[..., Table]) -> bool:
    """Whether the last level of a family has one unit, whatever the number of tasks."""
    return family in (shared_bottom, omoe)
