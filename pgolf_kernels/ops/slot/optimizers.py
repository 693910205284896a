"""The optimisers SLOT uses, each on one flat parameter vector: AdamW as a loop, the steered ones as generators.

The surprise is the generator: it yields the points it wants evaluated and is sent (loss, gradient), so whoever owns the
objective decides what to batch. One generator per window gives independent step lengths, one generator over
all windows the joint form of the published systems; the algorithm is the same code.

Both follow torch.optim (2.13): AdamW with decoupled weight decay, LBFGS with line_search_fn="strong_wolfe".
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Trials = Generator[Tensor, tuple[float, Tensor], tuple[Tensor, list[float]]]
Closure = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [P] -> (loss [], gradient [P])


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; `lr_min` switches on a cosine from lr (first step) towards lr_min.

    With gradients far above eps every coordinate moves by about lr per step. eps matters when the loss is divided by a
    whole batch's count, because that scales the gradient of one window by 1/B.
    """

    lr: float = 0.005
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-5
    weight_decay: float = 1e-8
    lr_min: float | None = None

    def learning_rates(self, steps: int) -> list[float]:
        """The learning rate of each step k = 0..steps-1: lr, or lr_min + (lr - lr_min)/2 (1 + cos(pi k/steps))."""
        if self.lr_min is None:
            return [self.lr] * steps
        half = 0.5 * (self.lr - self.lr_min)
        return [self.lr_min + half * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a strong-Wolfe line search; one step of slot_fit is a call of up to max_iter iterations.

    Args:
        lr: first trial step of every line search (of the very first: lr * min(1, 1/|g|_1)).
        max_iter: iterations per step.
        history: curvature pairs kept; they survive from step to step.
        max_eval: evaluations per step after which no iteration starts; None is max_iter * 5 // 4.
        max_line_search: evaluations per line search; None is what is left of max_eval (torch >= 2.10; before, 25).
        tolerance_grad: stop when max|g| is at most this.
        tolerance_change: stop when the loss or every coordinate changes by less than this.
        joint: share="window" only: one problem over all windows (one history, one step length), as the published
            system ran it. It couples the windows, so their scores are no longer causal.
    """

    lr: float = 1.0
    max_iter: int = 20
    history: int = 10
    max_eval: int | None = None
    max_line_search: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    joint: bool = False


@dataclass(frozen=True)
class HypergradientAdamW:
    """AdamW whose learning rate follows how far successive gradients agree.

    lr <- clamp(lr + rate <g_k, g_k-1>, lr_min, lr_max) before every step but the first.

    Args:
        lr: of the first step, which has no gradient before it.
        rate: per unit of the product; 0 keeps lr.
        joint: share="window" only: one product and one lr over all windows, as the published system ran it. It couples
            the windows, so their scores are no longer causal.
    """

    lr: float = 0.012
    rate: float = 1e-5
    lr_min: float = 0.001
    lr_max: float = 0.024
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-5
    weight_decay: float = 1e-8
    joint: bool = False


Steered = LBFGS | HypergradientAdamW  # what runs as a generator


def adamw(config: AdamW, x: Tensor, steps: int, evaluate: Closure) -> tuple[Tensor, list[Tensor]]:
    """Return x after `steps` steps and the loss before each of them."""
    beta1, beta2 = config.betas
    m, v, losses = torch.zeros_like(x), torch.zeros_like(x), []
    for k, lr in enumerate(config.learning_rates(steps), start=1):
        loss, g = evaluate(x)
        losses.append(loss)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        x = _adamw_step(config, x, m, v, k, lr)
    return x, losses


def _adamw_step(config: AdamW | HypergradientAdamW, x: Tensor, m: Tensor, v: Tensor, k: int, lr: float) -> Tensor:
    """x after step k = 1, 2, ..., from the moments that already hold its gradient."""
    beta1, beta2 = config.betas
    x = x * (1 - lr * config.weight_decay)
    return x - lr * (m / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + config.eps)


def trials(config: Steered, x: Tensor, steps: int) -> Trials:
    """The generator of a steered optimiser: yields points, receives (loss, gradient), returns x and losses [steps]."""
    return (lbfgs if isinstance(config, LBFGS) else hypergradient_adamw)(config, x, steps)


def hypergradient_adamw(config: HypergradientAdamW, x: Tensor, steps: int) -> Trials:
    """Yield the point before each step, receive (loss, gradient); return x and those losses."""
    beta1, beta2 = config.betas
    m, v, g_prev, lr, losses = torch.zeros_like(x), torch.zeros_like(x), None, config.lr, []
    for k in range(1, steps + 1):
        loss, g = yield x
        losses.append(loss)
        if g_prev is not None:
            lr = min(max(lr + config.rate * float(g.dot(g_prev)), config.lr_min), config.lr_max)
        g_prev = g.clone()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        x = _adamw_step(config, x, m, v, k, lr)
    return x, losses


def drive(trials: Trials, evaluate: Closure) -> tuple[Tensor, list[float]]:
    """Run one L-BFGS to its end against one objective."""
    answer = None
    try:
        while True:
            loss, gradient = evaluate(trials.send(answer))
            answer = float(loss), gradient
    except StopIteration as finished:
        return finished.value


class _Point(NamedTuple):
    """A trial of the line search: step length, loss, gradient, slope along the direction."""

    t: float
    loss: float
    g: Tensor
    slope: float


def lbfgs(config: LBFGS, x: Tensor, steps: int) -> Trials:
    """Yield points to evaluate, receive (loss, gradient); return x and the loss at the start of each step."""
    max_eval = config.max_iter * 5 // 4 if config.max_eval is None else config.max_eval
    pairs: list[tuple[Tensor, Tensor, float]] = []  # (y, s, 1 / y.s), oldest first
    d, t, h_diag, g_prev, losses = None, 0.0, 1.0, None, []
    for _ in range(steps):
        loss, g = yield x
        losses.append(loss)
        num_evals, num_iter = 1, 0
        if float(g.abs().max()) <= config.tolerance_grad:
            continue
        while num_iter < config.max_iter:
            num_iter += 1
            if d is None:
                d = -g
                t = config.lr * min(1.0, 1.0 / float(g.abs().sum()))
            else:
                y, s = g - g_prev, d * t
                if (ys := float(y.dot(s))) > 1e-10:
                    pairs = [*pairs, (y, s, 1.0 / ys)][-config.history :]
                    h_diag = ys / float(y.dot(y))
                d = _two_loop(g, pairs, h_diag)
                t = config.lr
            g_prev, loss_prev = g, loss
            slope = float(g.dot(d))
            if slope > -config.tolerance_change:
                break
            cap = max_eval - num_evals if config.max_line_search is None else config.max_line_search
            found, evals = yield from _strong_wolfe(x, d, _Point(0.0, loss, g, slope), t, cap, config.tolerance_change)
            t, loss, g = found.t, found.loss, found.g
            x = x + t * d
            num_evals += evals
            if (
                num_evals >= max_eval
                or float(g.abs().max()) <= config.tolerance_grad
                or float((d * t).abs().max()) <= config.tolerance_change
                or abs(loss - loss_prev) < config.tolerance_change
            ):
                break
    return x, losses


def _two_loop(g: Tensor, pairs: list[tuple[Tensor, Tensor, float]], h_diag: float) -> Tensor:
    """-(approximate inverse Hessian) g, with h_diag * identity as its start. Nocedal & Wright, algorithm 7.4."""
    r, alphas = -g, []
    for y, s, rho in reversed(pairs):
        alphas.append(float(s.dot(r)) * rho)
        r = r - alphas[-1] * y
    r = r * h_diag
    for (y, s, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + (alpha - float(y.dot(r)) * rho) * s
    return r


def _cubic_minimum(a: _Point, b: _Point, low: float, high: float) -> float:
    """Where the cubic through both points and slopes is least, clamped to [low, high]; if nowhere, the middle."""
    if a.t > b.t:
        a, b = b, a
    middle = (low + high) / 2
    if a.t == b.t:
        return middle
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return middle
    d2 = math.sqrt(square)
    if (curvature := b.slope - a.slope + 2 * d2) == 0:
        return middle
    return min(max(b.t - (b.t - a.t) * ((b.slope + d2 - d1) / curvature), low), high)


def _strong_wolfe(x: Tensor, d: Tensor, start: _Point, t: float, max_evals: int, tolerance: float):
    """Find t with sufficient decrease (c1 = 1e-4) and a small slope (c2 = 0.9): bracket, then zoom.

    Returns (the chosen point, the number of evaluations). One evaluation is made even if max_evals is less.
    """

    def decreases_enough(p: _Point) -> bool:
        return not p.loss > start.loss + 1e-4 * p.t * start.slope

    def flat_enough(p: _Point) -> bool:
        return abs(p.slope) <= -0.9 * start.slope

    def trial(t: float):
        loss, g = yield x + t * d
        return _Point(t, loss, g, float(g.dot(d)))

    previous, p = start, (yield from trial(t))
    evals, tries = 1, 0
    while True:
        if tries >= max_evals:  # out of budget before a bracket was found
            return min(start, p, key=lambda q: q.loss), evals
        if not decreases_enough(p) or (tries > 1 and p.loss >= previous.loss):
            break
        if flat_enough(p):
            return p, evals
        if p.slope >= 0:
            break
        t = _cubic_minimum(previous, p, p.t + 0.01 * (p.t - previous.t), 10 * p.t)
        previous, p = p, (yield from trial(t))
        evals, tries = evals + 1, tries + 1

    low, high = (previous, p) if previous.loss <= p.loss else (p, previous)
    largest, stalled = float(d.abs().max()), False
    while tries < max_evals and abs(high.t - low.t) * largest >= tolerance:
        left, right = min(low.t, high.t), max(low.t, high.t)
        t = _cubic_minimum(low, high, left, right)
        margin = 0.1 * (right - left)
        if min(right - t, t - left) >= margin:
            stalled = False
        elif stalled or t >= right or t <= left:  # twice in a row too close to an end: step inside
            t = right - margin if abs(t - right) < abs(t - left) else left + margin
            stalled = False
        else:
            stalled = True
        p = yield from trial(t)
        evals, tries = evals + 1, tries + 1
        if not decreases_enough(p) or p.loss >= low.loss:
            low, high = (low, p) if low.loss <= p.loss else (p, low)
        elif flat_enough(p):
            return p, evals
        else:
            low, high = p, (low if p.slope * (high.t - low.t) >= 0 else high)
    return low, evals
