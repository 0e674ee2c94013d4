"""What a call costs besides its arithmetic: the AdaTT layer with its 39 tensors, each of them tiny,
beside a C++ autograd node with as many.
"""

from __future__ import annotations

import torch

from fusedmoe.speed.arms import Local, Session, Setting
from fusedmoe.speed.calls import inference, training_step
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.measuring import ROUNDS, Times, measure, pinned
from fusedmoe.speed.subjects import SUBJECTS, Work

TINY = SUBJECTS["AdaTT T3m2"]._replace(input=2, experts=((2,), (2,)))


def overhead(session: Session, rounds: int = ROUNDS) -> dict[str, object]:
    """Return the number of tensors of a call (parameters and x), and the seconds of each arm by
    name.

    Raises: Absent if nothing fuses.

    "forward": the tiny network without gradients; "forward, backward": with gradients of all;
    "torch.cat": forward and backward of a concatenation of as many leaves.
    """
    setting = Setting(Cell("tiny", TINY, "training step", 1), session)
    layer = setting.fused().layer
    params = list(layer.parameters())
    work = Work(setting.work.x.unsqueeze(1).expand(-1, setting.layer.slots, -1), setting.work.d_out)
    leaves = [torch.ones(1, requires_grad=True) for _ in range(len(params) + 1)]
    arms = {
        "forward": Local(inference(layer, params, work)),
        "forward, backward": Local(training_step(layer, params, work)),
        # Work's x is the first leaf that a training step makes; the others are its parameters.
        "torch.cat": Local(
            training_step(
                lambda x: torch.cat([x, *leaves[1:]]), leaves[1:], Work(leaves[0].detach(), torch.ones(len(leaves)))
            )
        ),
    }
    with pinned(1):
        times: dict[str, Times] = measure(arms, rounds)
    return {"tensors": len(leaves), "arms": {name: seconds._asdict() for name, seconds in times.items()}}
