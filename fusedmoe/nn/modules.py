"""One class per family: the reference layer with a fused forward.

`G` are gate weights, `v` static weights, `y[e] = MLP_e(input of e)`, softmax over the experts that
the unit sees.
"""

from __future__ import annotations

import torch

from fusedmoe.nn import wiring
from fusedmoe.nn.fused import Fused
from fusedmoe.reference import layers


class SingleTask(Fused, layers.SingleTask):
    """out[t] = y[t]: a bottom per task; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.SingleTask`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, section 6.1.
    """

    wiring = staticmethod(wiring.single_task)


class SharedBottom(Fused, layers.SharedBottom):
    """out[t] = y[0]: one bottom for all tasks; [B, D] to [B, T, H], expanded.

    Args: those of `fusedmoe.reference.layers.SharedBottom`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equation 1.
    """

    wiring = staticmethod(wiring.shared_bottom)


class OMoE(Fused, layers.OMoE):
    """out[t] = sum over e of softmax(G x)[e] * y[e]: one gate for all tasks; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.OMoE`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equation 5.
    """

    wiring = staticmethod(wiring.omoe)


class MMoE(Fused, layers.MMoE):
    """out[t] = sum over e of softmax(G[t] x)[e] * y[e]: a gate per task; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.MMoE`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equations 6 to 8.
    """

    wiring = staticmethod(wiring.mmoe)


class MLMMoE(Fused, layers.MLMMoE):
    """Levels of MMoE: expert e reads unit e of the level below, every gate x; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.MLMMoE`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, section 4.1; PLE, figure 1h.
    """

    wiring = staticmethod(wiring.ml_mmoe)


class CGC(Fused, layers.CGC):
    """out[t] = sum over own(t) and shared e of softmax(G[t] x)[e] * y[e]; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.CGC`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, equations 2 to 5.
    """

    wiring = staticmethod(wiring.cgc)


class PLE(Fused, layers.PLE):
    """out[u] = sum over sees(u) of softmax(G[u] x[u])[e] * y[e]; the shared unit sees all experts.

    It maps [B, T + 1, D], the shared slot last, to [B, T, H].

    Args: those of `fusedmoe.reference.layers.PLE`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, equations 6 and 7.
    """

    wiring = staticmethod(wiring.ple)


class AdaTTSp(Fused, layers.AdaTTSp):
    """out[t] = sum over all e of (softmax(G[t] x[t])[e] + v[t, e]) * y[e]; [B, T, D] to [B, T, H].

    v[t, e] is zero for experts that do not belong to task t.

    Args: those of `fusedmoe.reference.layers.AdaTTSp`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, equations 2 to 10.
    """

    wiring = staticmethod(wiring.adatt_sp)


class AdaTT(Fused, layers.AdaTT):
    """As AdaTTSp, with shared experts and, below the last level, a shared unit that owns them.

    It maps [B, T + 1, D], the shared slot last, to [B, T, H].

    Args: those of `fusedmoe.reference.layers.AdaTT`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, section 3.2.
    """

    wiring = staticmethod(wiring.adatt)


AdaTTWSharedExps = AdaTT


class CrossStitch(Fused, layers.CrossStitch):
    """out[u] = sum over t of v[u, t] * y[t], v learned; [B, T, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.CrossStitch`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: Misra et al., CVPR 2016, equation 1.
    """

    wiring = staticmethod(wiring.cross_stitch)


class AsymmetricSharing(Fused, layers.AsymmetricSharing):
    """out[t] = sum, mean or concatenation of the bottoms y[e] that task t borrows.

    It maps [B, D] to [B, T, H], or to [B, T, n H] for a concatenation of n bottoms.

    Args: those of `fusedmoe.reference.layers.AsymmetricSharing`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, section 3.2.
    """

    wiring = staticmethod(wiring.asymmetric_sharing)


class CustomizedSharing(Fused, layers.CustomizedSharing):
    """out[t] = [y[t], y[T]]: a task's own bottom and a shared one; [B, D] to [B, T, 2 H].

    Args: those of `fusedmoe.reference.layers.CustomizedSharing`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, section 3.2.
    """

    wiring = staticmethod(wiring.customized_sharing)


class CentralTaskArch(Fused, layers.CentralTaskArch):
    """A backbone and a tower per task: out[t] = W[t] MLP[t](backbone(x)[t]) + b[t].

    It maps [B, D] to a list of T tensors [B, 1].

    Args: those of `fusedmoe.reference.layers.CentralTaskArch`, `backend` and `recompute`.
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    """

    wiring = staticmethod(wiring.central)

    def forward(self, task_arch_input: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]  # as the library has it
        """Return a list of T outputs [B, 1] from [B, D]. Raises: as `Fused.forward`."""
        return self.bind().run(task_arch_input, self.backend, recompute=self.recompute, tasks_apart=True)
