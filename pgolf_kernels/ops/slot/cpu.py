"""SLOT in C++ (csrc/slot): hands tensors over as pointers, and drives steered optimisers for all windows in lockstep.

The surprise: bfloat16 input is more accurate here than in the reference, which rounds the base logits to bfloat16; the
kernel keeps them in float32 until it stores tanh(L / c) as float16. `isa` forces an instruction set, for tests.
"""

import torch
from torch import Tensor

from ... import extension
from . import optimizers
from .problem import Fit, Score, address, window_stride


def why_not(p: Fit | Score) -> str | None:
    """None if the C++ kernel can run p."""
    if p.hidden.device.type != "cpu" or p.hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel needs float32 or bfloat16 CPU tensors, got {p.hidden.dtype} on {p.hidden.device}"
    return extension.WHY_NOT_CPU


class _Inputs:
    """SlotProblem, and the contiguous tensors it points into, which must outlive it."""

    def __init__(self, p: Fit | Score, isa: str) -> None:
        self.tensors = [t.contiguous() for t in (p.hidden, p.weight, p.targets)]
        hidden, weight, targets = map(address, self.tensors)
        self.problem = extension.cpu.SlotProblem(
            hidden=hidden,
            weight=weight,
            targets=targets,
            sizes=(*p.hidden.shape, len(p.weight)),
            bf16=p.hidden.dtype == torch.bfloat16,
            softcap=p.softcap or 0.0,
            before=p.norm == "before",
            threads=torch.get_num_threads(),
            isa=isa,
        )


def fit(p: Fit, isa: str = "") -> tuple[Tensor, Tensor]:
    """Return the parameters [G, P] and the losses [steps, G], as reference.fit does."""
    inputs, weights = _Inputs(p, isa), p.weights.contiguous()
    objective = extension.cpu.SlotObjective(
        weights=address(weights),
        delta=p.parameters != "bias",
        bias=p.parameters != "delta",
        shared=p.shared,
    )
    x = p.start
    if isinstance(p.optimizer, optimizers.Steered):
        return _fit_steered(p, extension.cpu.SlotEvaluator(inputs.problem, objective), x)
    losses = torch.empty(p.steps, len(x))
    extension.cpu.slot_fit_adamw(
        inputs.problem,
        objective,
        learning_rates=p.optimizer.learning_rates(p.steps),
        beta1=p.optimizer.betas[0],
        beta2=p.optimizer.betas[1],
        eps=p.optimizer.eps,
        weight_decay=p.optimizer.weight_decay,
        x=address(x),
        losses=address(losses),
    )
    return x, losses


def _fit_steered(p: Fit, evaluator, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each round evaluates the trial points of all unfinished groups in one call."""
    active = [g for g, windows in enumerate(p.groups()) if any(p.num_rows[i] for i in windows)]

    def evaluate(groups: list[int], points: Tensor) -> tuple[list[float], Tensor]:
        losses, gradients = torch.empty(len(groups), dtype=torch.float64), torch.empty_like(points)
        evaluator.evaluate(groups, x=address(points), losses=address(losses), gradients=address(gradients))
        return losses.tolist(), gradients

    if p.optimizer.joint:
        losses = x.new_zeros(p.steps, 1)
        if active:

            def joint(flat: Tensor) -> tuple[float, Tensor]:
                parts, gradients = evaluate(active, flat.view(len(active), -1))
                return sum(parts), gradients.flatten()

            found, history = optimizers.drive(optimizers.trials(p.optimizer, x[active].flatten(), p.steps), joint)
            x[active], losses[:, 0] = found.view(len(active), -1), x.new_tensor(history)
        return x, losses

    losses = x.new_zeros(p.steps, len(x))
    runs = {g: optimizers.trials(p.optimizer, x[g].clone(), p.steps) for g in active}
    answers = dict.fromkeys(active)
    while runs:
        trials = {}
        for g, run in list(runs.items()):
            try:
                trials[g] = run.send(answers[g])
            except StopIteration as finished:
                x[g], history = finished.value
                losses[:, g] = x.new_tensor(history)
                del runs[g]
        if trials:
            values, gradients = evaluate(list(trials), torch.stack(list(trials.values())))
            # A copy each: dot products round differently at another alignment.
            answers = {g: (v, d.clone()) for g, v, d in zip(trials, values, gradients, strict=True)}
    return x, losses


def score(p: Score, isa: str = "") -> Tensor:
    """Return the negative log-likelihoods, as reference.score does."""
    inputs, rows = _Inputs(p, isa), p.rows.contiguous()
    delta, bias = (None if v is None else v.contiguous() for v in (p.delta, p.bias))

    nll = torch.empty(sum(p.num_rows))
    extension.cpu.slot_score(
        inputs.problem,
        rows=address(rows),
        delta=address(delta),
        delta_stride=window_stride(delta),
        bias=address(bias),
        bias_stride=window_stride(bias),
        nll=address(nll),
    )
    return nll
