"""One class per family: the reference layer with a fused forward.

`G` are gate weights, `v` static weights, `y[e] = MLP_e(input of e)`, softmax over the experts that
the unit sees.
"""

from __future__ import annotations

import torch

from fusedmoe.nn import wiring
from fusedmoe.nn.fused import Fused
from fusedmoe.reference import layers


class SingleTask(Fused, layers.SingleTask, make_wiring=wiring.single_task):
    """out[t] = y[t]: a bottom per task; [B, D] to [B, T, H].

    Source: MMoE, section 6.1.
    """


class SharedBottom(Fused, layers.SharedBottom, make_wiring=wiring.shared_bottom):
    """out[t] = y[0]: one bottom for all tasks; [B, D] to [B, T, H], expanded.

    Source: MMoE, equation 1.
    """


class OMoE(Fused, layers.OMoE, make_wiring=wiring.omoe):
    """out[t] = sum over e of softmax(G x)[e] * y[e]: one gate for all tasks; [B, D] to [B, T, H].

    Source: MMoE, equation 5.
    """


class MMoE(Fused, layers.MMoE, make_wiring=wiring.mmoe):
    """out[t] = sum over e of softmax(G[t] x)[e] * y[e]: a gate per task; [B, D] to [B, T, H].

    Source: MMoE, equations 6 to 8.
    """


class MLMMoE(Fused, layers.MLMMoE, make_wiring=wiring.ml_mmoe):
    """Levels of MMoE: expert e reads unit e of the level below, every gate x; [B, D] to [B, T, H].

    Source: AdaTT, section 4.1; PLE, figure 1h.
    """


class CGC(Fused, layers.CGC, make_wiring=wiring.cgc):
    """out[t] = sum over own(t) and shared e of softmax(G[t] x)[e] * y[e]; [B, D] to [B, T, H].

    Source: PLE, equations 2 to 5.
    """


class PLE(Fused, layers.PLE, make_wiring=wiring.ple):
    """out[u] = sum over sees(u) of softmax(G[u] x[u])[e] * y[e]; the shared unit sees all experts.

    It maps [B, T + 1, D], the shared slot last, to [B, T, H].

    Source: PLE, equations 6 and 7.
    """


class AdaTTSp(Fused, layers.AdaTTSp, make_wiring=wiring.adatt_sp):
    """out[t] = sum over all e of (softmax(G[t] x[t])[e] + v[t, e]) * y[e]; [B, T, D] to [B, T, H].

    v[t, e] is zero for experts that do not belong to task t.

    Source: AdaTT, equations 2 to 10.
    """


class AdaTT(Fused, layers.AdaTT, make_wiring=wiring.adatt):
    """As AdaTTSp, with shared experts and, below the last level, a shared unit that owns them.

    It maps [B, T + 1, D], the shared slot last, to [B, T, H].

    Source: AdaTT, section 3.2.
    """


AdaTTWSharedExps = AdaTT


class CrossStitch(Fused, layers.CrossStitch, make_wiring=wiring.cross_stitch):
    """out[u] = sum over t of v[u, t] * y[t], v learned; [B, T, D] to [B, T, H].

    Source: Misra et al., CVPR 2016, equation 1.
    """


class AsymmetricSharing(Fused, layers.AsymmetricSharing, make_wiring=wiring.asymmetric_sharing):
    """out[t] = sum, mean or concatenation of the bottoms y[e] that task t borrows.

    It maps [B, D] to [B, T, H], or to [B, T, n H] for a concatenation of n bottoms.

    Source: PLE, section 3.2.
    """


class CustomizedSharing(Fused, layers.CustomizedSharing, make_wiring=wiring.customized_sharing):
    """out[t] = [y[t], y[T]]: a task's own bottom and a shared one; [B, D] to [B, T, 2 H].

    Source: PLE, section 3.2.
    """


class CentralTaskArch(Fused, layers.CentralTaskArch, make_wiring=wiring.central):
    """A backbone and a tower per task: out[t] = W[t] MLP[t](backbone(x)[t]) + b[t].

    It maps [B, D] to a list of T tensors [B, 1].
    """

    # As the library has it.
    def forward(self, task_arch_input: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """Return a list of T outputs [B, 1] from [B, D]. Raises: as `Fused.forward`."""
        return self.bind().run(task_arch_input, self.backend, recompute=self.recompute, tasks_apart=True)
