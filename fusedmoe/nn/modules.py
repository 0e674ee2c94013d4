"""One class per family: the reference layer with a fused forward.

`G` are gate weights, `v` static weights, `y[e] = MLP_e(input of e)`, softmax over the experts that the unit sees.
"""

from __future__ import annotations

import torch

from fusedmoe.nn import wiring
from fusedmoe.nn.fused import Fused
from fusedmoe.reference import layers


class SingleTask(Fused, layers.SingleTask):
    """out[t] = y[t]: a bottom per task; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.SingleTask`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, section 6.1.
    """

    wiring = staticmethod(wiring.single_task)


class SharedBottom(Fused, layers.SharedBottom):
    """out[t] = y[0]: one bottom for all tasks; [B, D] to [B, T, H], expanded.

    Args: those of `fusedmoe.reference.layers.SharedBottom`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equation 1.
    """

    wiring = staticmethod(wiring.shared_bottom)


class OMoE(Fused, layers.OMoE):
    """out[t] = sum over e of softmax(G x)[e] * y[e]: one gate for all tasks; [B, D] to [B, T, H], expanded.

    Args: those of `fusedmoe.reference.layers.OMoE`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equation 5.
    """

    wiring = staticmethod(wiring.omoe)


class MMoE(Fused, layers.MMoE):
    """out[t] = sum over e of softmax(G[t] x)[e] * y[e]: a gate per task; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.MMoE`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: MMoE, equations 6 to 8.
    """

    wiring = staticmethod(wiring.mmoe)


class MLMMoE(Fused, layers.MLMMoE):
    """Levels of MMoE, every gate on the root input, expert e of a level reading unit e of the level below; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.MLMMoE`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, section 4.1; PLE, figure 1h.
    """

    wiring = staticmethod(wiring.ml_mmoe)


class CGC(Fused, layers.CGC):
    """out[t] = sum over own(t) and shared e of softmax(G[t] x)[e] * y[e]; [B, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.CGC`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, equations 2 to 5.
    """

    wiring = staticmethod(wiring.cgc)


class PLE(Fused, layers.PLE):
    """out[u] = sum over sees(u) of softmax(G[u] x[u])[e] * y[e], the shared unit seeing all; [B, T + 1, D], shared last, to [B, T, H].

    Args: those of `fusedmoe.reference.layers.PLE`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, equations 6 and 7.
    """

    wiring = staticmethod(wiring.ple)


class AdaTTSp(Fused, layers.AdaTTSp):
    """out[t] = sum over all e of (softmax(G[t] x[t])[e] + v[t, e]) * y[e], v zero outside own(t); [B, T, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.AdaTTSp`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, equations 2 to 10.
    """

    wiring = staticmethod(wiring.adatt_sp)


class AdaTT(Fused, layers.AdaTT):
    """As AdaTTSp, with shared experts and, below the last level, a shared unit that owns them; [B, T + 1, D], shared last, to [B, T, H].

    Args: those of `fusedmoe.reference.layers.AdaTT`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: AdaTT, section 3.2.
    """

    wiring = staticmethod(wiring.adatt)


AdaTTWSharedExps = AdaTT


class CrossStitch(Fused, layers.CrossStitch):
    """out[u] = sum over t of v[u, t] * y[t], v learned; [B, T, D] to [B, T, H].

    Args: those of `fusedmoe.reference.layers.CrossStitch`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: Misra et al., CVPR 2016, equation 1.
    """

    wiring = staticmethod(wiring.cross_stitch)


class AsymmetricSharing(Fused, layers.AsymmetricSharing):
    """out[t] = sum, mean or concatenation of y[e] over the e that t borrows; [B, D] to [B, T, H] or [B, T, n H].

    Args: those of `fusedmoe.reference.layers.AsymmetricSharing`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, section 3.2.
    """

    wiring = staticmethod(wiring.asymmetric_sharing)


class CustomizedSharing(Fused, layers.CustomizedSharing):
    """out[t] = [y[t], y[T]]: a bottom per task and a shared one, concatenated; [B, D] to [B, T, 2 H].

    Args: those of `fusedmoe.reference.layers.CustomizedSharing`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    Source: PLE, section 3.2.
    """

    wiring = staticmethod(wiring.customized_sharing)


class CentralTaskArch(Fused, layers.CentralTaskArch):
    """A backbone and a tower per task in one operator call: out[t] = W[t] MLP[t](backbone(x)[t]) + b[t]; [B, D] to a list of T [B, 1].

    Args: those of `fusedmoe.reference.layers.CentralTaskArch`, and `backend` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
    """

    wiring = staticmethod(wiring.central)

    def forward(self, task_arch_input: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]  # as the library has it
        """Return a list of T outputs [B, 1] from [B, D]. Raises: as `Fused.forward`."""
        return self.bind().run(task_arch_input, self.backend, recompute=self.recompute, tasks_apart=True)
