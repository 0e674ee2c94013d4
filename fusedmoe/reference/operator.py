"""The operator in plain PyTorch: a network of levels with task towers on top. Read this file first.

Every faster backend is checked against `forward` and `backward`; both are checked against loops
written from the papers.

Sizes: B rows; inputs x_i [B, S_i, D_i]; per level E experts of output width H and U fusion units; T
tasks. Whatever reads takes the concatenation of its sources: columns of input slots, of units of any
level below, and of experts of its level.

Forward, for every row b of one level:

    y[e]     = MLP_e(sources of e)                       stage by stage, below; without stages a copy
    z[u,e]   = factor (MLP_u(selector of u))[e]          for e in sees(u); factor = 1 / temperature
             | factor b[u,e]                             a free gate: the same for every row
             | factor q[u] . k[u,e]                      attention: q and k are sources
    p[u,:]   = softmax over sees(u) of z[u,:]            0 over nothing, and without a gate
    w[u,e]   = p[u,e] + v[u,e]     for e in reads(u)     v: static weights; or v[u,e,:], one a column
    out[u,:] = sum over e in reads(u) of w[u,e] y[e,:]   ascending in e; 0 if u reads nothing
             | y[a,:] y[b,:]                             of a unit that is the product of two experts

reads(u) are the experts in sees(u) and those of v[u].

A stage is h' = m a(z): m dropout's mask in a call that trains, 0 or 1 / (1 - p) by `philox.py`, else
1; a the activation, or PReLU's

    a(z) = z where z > 0, else s z                       s: learned, one or one a column

and z one of    h (+ b)  |  W h + b  |  gamma o + beta, a LayerNorm, with

    o = (h - mean(h)) l          l = 1 / sqrt(var(h) + eps)

Task t's tower is one more MLP over its sources. Rows never meet.

Backward, given g[u,:] = dLoss/d out[u,:] (and given[u,e] = dLoss/d w[u,e] where the caller used the
mixing weights, else 0):

- out is bilinear in w and y:            dw[u,e] = given[u,e] + g[u,:] . y[e,:]
                                         dy[e,:] = sum over u of w[u,e] g[u,:]
- w adds v, the same for every row:      dv[u,e] = sum over b of dw[u,e]            dp = dw
  and of one a column:                   dv[u,e,:] = sum over b of g[u,:] y[e,:]
- dp[i]/dz[j] = p[i] ([i = j] - p[j]):   dz[u,e] = p[u,e] (dw[u,e] - sum over sees(u) of p dw[u,:])
                                         computed as below, under "Digits of the softmax"
- factor dz goes through the gate's MLP to its selector; to b[u,:], as its sum over rows; and of
  attention dq = sum over e of factor dz[e] k[e],  dk[e] = factor dz[e] q
- a product of two experts:              dy[a] = g y[b]     dy[b] = g y[a]
- a stage, given dh':                    dz = a'(z) m dh'     ds = sum over b of dh' z where z <= 0
- a linear map z = W h + b:              dW = sum over b of dz h^T     db = sum over b of dz
                                         dh = W^T dz
- a LayerNorm, with do = gamma dz:       dgamma = sum over b of dz o   dbeta = sum over b of dz
                                         dh = l (do - mean(do) - o mean(do o))
- a source sums what everything that reads it sends, but for detached reads, which send nothing

Digits of the softmax. Subtract the mean c = sum of p dw from dw before the softmax's backward:
otherwise the rounding of two large terms swamps dz where one expert has nearly all the weight.
Where p[i] is near 1, its two terms nearly cancel: with roundoff r and m = sum of p dw, the error is
up to r |m|, and the true dz[i] is about (1 - p[i]) times differences of dw. But p sums to 1, so
subtracting one number c from every dw does not change dz. With c = m as computed:

    c = sum over e of p[e] dw[e]        t[e] = dw[e] - c
    rest = sum over e of p[e] t[e]      dz[e] = p[e] (t[e] - rest)

c's own error cancels, for it is a shift like any other; and `rest` corrects for p that does not sum
to exactly 1. With n = len(sees(u)) and M = sum of p |t|, the rounding that is left
is that of t, r |t[e]|; of rest, (n + 1) r M; of the difference and of the product: an error of
dz[e] of at most p[e] r (3 |t[e]| + (n + 4) M), to first order in r. t and M hold differences of dw,
and c's error of at most n r |m|, which the bound multiplies by r once more: the term r |m| is gone.
Subtracting the largest dw would help less: t of an expert with nearly all the weight, but not the
largest dw, stays as large as the differences, and so does M. dz's derivative by c is
p (sum of p - 1) = 0: dz can be differentiated again as it is written.

Pairs outside reads(u) are skipped, never multiplied by zero, and what no output depends on is
not computed: a NaN in an expert cannot reach a unit that does not read it. Source:
AdaTT (KDD 2023) eq. 2-10; MMoE eq. 6-8; PLE eq. 2-7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.activation import RELU, Activation
from fusedmoe.graph import NORM, NOTHING, Stage
from fusedmoe.reference.backward import Backward
from fusedmoe.reference.forward import Softmax, dense, deviation, last_softmax, own, run_forward
from fusedmoe.table import Table


def forward(
    x: Tensor, params: Sequence[Tensor], table: Table, softmax: Softmax = last_softmax, seed: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output of the network and the mixing weights w of its levels.

    Args:
        x: [B, S, D].
        params: one tensor per `table.parameters`, in that order and of those shapes.
        table: the network.
        softmax: what turns the logits [B, len(sees)] of a gate into p; the tests' truth has one
            that autograd differentiates more accurately.
        seed: of dropout, int64 [1] (`philox.py`); None: dropout is off.

    Returns: out [B, *table.output], and per level w [B, U, E], zero outside reads(u) and for units
        on which no output depends.
    """
    run = run_forward(x, params, table, softmax, seed)
    return run.out, tuple(dense(run, number, x) for number in range(len(table.levels)))


def backward(
    x: Tensor,
    params: Sequence[Tensor],
    table: Table,
    d_out: Tensor,
    d_weights: Sequence[Tensor | None],
    seed: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradients of the input and the parameters; they can be differentiated once more.

    Args:
        x, params, table, seed: as in `forward`.
        d_out: [B, *table.output], the gradient of the output.
        d_weights: per level the gradient [B, U, E] of the mixing weights, or None; entries outside
            reads(u) are ignored.

    Returns: d_x [B, S, D], and one gradient per parameter: None where no gradient reaches it.
    """
    down = Backward(run_forward(x, params, table, seed=seed), params, {}, [None] * len(params))
    down.outputs(d_out)
    for number in reversed(range(len(table.levels))):
        down.level(number, d_weights[number])
    slots = [down.d.get(("input", 0, s)) for s in range(x.shape[1])]
    d_x = torch.stack([torch.zeros_like(x[:, s]) if d is None else d for s, d in enumerate(slots)], 1)
    return d_x, tuple(down.grads)


def preactivations(x: Tensor, params: Sequence[Tensor], table: Table) -> Iterator[tuple[Activation, Tensor, Tensor]]:
    """Yield activation, z and the sum of the moduli of what z is summed from, of each stage computed.

    Both are [B, width]. The last one is the scale of z's rounding error: parity tests leave out
    rows whose z is so near to a kink that it may fall on either side.
    """
    run = run_forward(x, params, table)
    for mlp, trace in run.traces.values():
        for stage, (h, z, *_) in zip(mlp.stages, trace, strict=True):
            yield RELU if stage.slope != NOTHING else stage.activation, z, _scale(stage, h, params)


def _scale(stage: Stage, h: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The sum of the moduli of what the head of a stage sums, [B, width]."""
    weight, bias = own(stage.weight, params), own(stage.bias, params)
    if stage.kind == NORM:
        summed = (h.abs() + h.mean(-1, keepdim=True).abs()) * deviation(h, stage.eps)
        summed = summed if weight is None else summed * weight.abs()
    elif weight is None:
        summed = h.abs()
    else:
        summed = F.linear(h.abs(), weight.abs())
    return summed if bias is None else summed + bias.abs()
