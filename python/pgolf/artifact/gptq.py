"""GPTQ: round a matrix column by column and let the columns that are left make up for each column's error.

With x the input of y = W x and H = sum x x^T, columns are taken by descending H_jj. U is upper triangular with positive
diagonal and H^-1 = U^T U (of the permuted, damped H). Column j and scale s of a row give

    q = clamp(round_half_even(w_j / s), -m, m)      e = (w_j - q s) / U_jj      w_{j:} -= e U_{j,j:}

The surprise: H only steers the rounding. Scales come from the unpermuted weights as without GPTQ, and of several
candidate clips the one with the least plain squared error wins, not the one with the least error under H.
Rows do not see each other, so all matrices that share an input, and all their candidates, run as columns of one panel
[K, jobs]; a row whose candidates have the same scale, as under the published floor, runs once.
U needs no inverse of H: reversed, H = L L^T, and U is the reversed L^-1, in float64 half the work of the usual
three factorisations. Sources: Frantar et al., https://arxiv.org/abs/2210.17323; openai/parameter-golf #1217.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, SUB_BLOCK = 128, 16  # columns whose errors reach the rest of the matrix, and of their block, in one product
PANEL_JOBS = 4096  # rows at once: SUB_BLOCK of their columns stay in the second-level cache
LEAST_MEAN_DIAGONAL = 1e-6


@dataclass(frozen=True)
class Damping:
    """What is added to the diagonal: share * mean(diag H), `times` times; twice as #1217 does, once as #1333."""

    share: float = 0.01
    times: int = 1


@dataclass(frozen=True, eq=False)
class Factor:
    """order int64 [K]: columns by descending diagonal; upper float32 [K, K]: U; dead bool [K]: inputs never seen."""

    order: Tensor
    upper: Tensor
    dead: Tensor


def factorise(hessian: Tensor, damping: Damping) -> Factor | None:
    """Args: hessian: float32 [K, K], symmetric, undamped. Returns: None if it is not positive definite when damped."""
    h = hessian.float().clone()
    diagonal = h.diagonal()  # a view
    for _ in range(damping.times - 1):
        diagonal += damping.share * diagonal.mean().clamp_min(LEAST_MEAN_DIAGONAL)
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping.share * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    reversed_order = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(h[reversed_order][:, reversed_order].double())
    if failed:
        return None
    identity = torch.eye(len(h), dtype=torch.float64, device=h.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return Factor(order, inverse.flip(0, 1).float(), dead)


def feedback_variance(factor: Factor) -> Tensor:
    """Variance that the errors of earlier columns have added to each column by the time it is rounded.

    A rounding error is uniform over a step, so column j gets sum over i < j of (U_ij / U_ii)^2 / 12.

    Returns:
        float64 [K], in squared steps, in the order of the factor; rounding itself adds 1/12 to every column.
    """
    upper = factor.upper.double()
    return (upper / upper.diagonal()[:, None]).square_().triu_(1).sum(0) / 12


def quantise_together(
    matrices: list[Tensor], scales: list[Tensor], factor: Factor, code_max: int
) -> list[tuple[Tensor, Tensor]]:
    """GPTQ of matrices that have one input.

    Args:
        matrices: float32 [N_i, K].
        scales: float16 [candidates, N_i] of each, all positive.
        factor: of the Hessian of their input.
        code_max: m; codes lie in -m..m.

    Returns:
        (codes int8 [N_i, K], scale float16 [N_i]) of each.
    """
    slots, rows, steps, first = [], [], [], 0
    for w, candidates in zip(matrices, scales, strict=True):
        fresh = torch.ones_like(candidates, dtype=torch.bool)
        fresh[1:] = candidates[1:] != candidates[:-1]
        fresh = fresh.T.contiguous()  # [N, candidates]: the jobs of a row stand together
        slots.append(first + fresh.flatten().cumsum(0).view_as(fresh).T - 1)
        first += int(fresh.sum())
        rows.append(_permuted(w, factor).repeat_interleave(fresh.sum(1), dim=0))
        steps.append(candidates.T[fresh].float())
    codes, error = _run_jobs(torch.cat(rows), torch.cat(steps), factor.upper, code_max)
    results = []
    for candidates, slot in zip(scales, slots, strict=True):
        errors = error[slot].sum(1).tolist()
        best = min(range(len(errors)), key=errors.__getitem__)  # the first of equals
        chosen = torch.empty(slot.shape[1], codes.shape[0], dtype=torch.int8, device=codes.device)
        chosen[:, factor.order] = codes[:, slot[best]].T
        results.append((chosen, candidates[best]))
    return results


def _permuted(w: Tensor, factor: Factor) -> Tensor:
    return torch.where(factor.dead, 0.0, w.float())[:, factor.order]


def _run_jobs(w: Tensor, scale: Tensor, upper: Tensor, code_max: int) -> tuple[Tensor, Tensor]:
    """w float32 [jobs, K], scale float32 [jobs] -> codes int8 [K, jobs], squared error float64 [jobs]."""
    codes = torch.empty(w.shape[1], w.shape[0], dtype=torch.int8, device=w.device)
    error = torch.empty(w.shape[0], dtype=torch.float64, device=w.device)
    for start in range(0, len(w), PANEL_JOBS):
        part = slice(start, start + PANEL_JOBS)
        exact = w[part].T.contiguous()
        q = _feed_back(exact.clone(), scale[part], upper, code_max)
        codes[:, part] = q.to(torch.int8)
        error[part] = (exact - q * scale[part]).square_().sum(0, dtype=torch.float64)
    return codes, error


def _feed_back(w: Tensor, scale: Tensor, upper: Tensor, code_max: int) -> Tensor:
    """The loop of the module's docstring on w [K, jobs], which it overwrites; codes as float32 [K, jobs]."""
    q = torch.empty_like(w)
    error = torch.empty_like(w[:BLOCK])
    for begin in range(0, len(w), BLOCK):
        end = min(begin + BLOCK, len(w))
        for sub in range(begin, end, SUB_BLOCK):
            stop = min(sub + SUB_BLOCK, end)
            diagonal = upper.diagonal()[sub:stop].tolist()
            for j in range(sub, stop):
                torch.div(w[j], scale, out=q[j]).round_().clamp_(-code_max, code_max)
                e = torch.mul(q[j], scale, out=error[j - begin])
                torch.sub(w[j], e, out=e).div_(diagonal[j - sub])
                if j + 1 < stop:
                    w[j + 1 : stop].addr_(upper[j, j + 1 : stop], e, alpha=-1)
            w[stop:end].addmm_(upper[sub:stop, stop:end].T, error[sub - begin : stop - begin], alpha=-1)
        w[end:].addmm_(upper[begin:end, end:].T, error[: end - begin], alpha=-1)
    return q
