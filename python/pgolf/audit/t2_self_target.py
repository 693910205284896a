"""T2: change only the token that is scored; its distribution must keep its bits.

A hint that is switched on by the target itself passes a test of single scores: the distribution moves to wherever the
target is. So the whole of it is compared, found by substitution (vocabulary.py) in a batch of one window; and a few
tokens of it, the target among them, in a batch as large as the evaluator makes them, where other windows hold the
target as context.
"""

import torch

from .case import Case, Finding
from .passes import flipped
from .vocabulary import Cut, Distributions, cuts, distributions

NAME, TITLE, CONDITION = "T2", "Self-target", "C1"
FEW = 8  # tokens that are tried in a whole batch


def run(case: Case) -> Finding:
    generator, V = case.generator(NAME), case.vocab_size
    num_changed, num_compared, largest, tried = 0, 0, 0.0, []

    def compare(first: int, end: int, cut: Cut | None) -> None:
        nonlocal num_changed, num_compared, largest
        target = first + int(torch.randint(end - first, (), generator=generator))
        other = flipped(case.tokens, target, V, int(torch.randint(V - 1, (), generator=generator)))
        if cut is None:
            chosen = torch.randperm(V, generator=generator)[:FEW].tolist()
            substitutes = sorted({*chosen, int(case.tokens[target + 1]), int(other[target + 1])})
            probes = [Distributions([target], V, substitutes) for _ in range(2)]
            for tokens, probe in zip((case.tokens, other), probes, strict=True):
                case.run(tokens, probe=probe, stop_after=end - 1)
            before, after = (probe.log_p[0, substitutes] for probe in probes)
        else:
            before, after = (distributions(case, tokens, cut, [target])[0] for tokens in (case.tokens, other))
        differ = ~(before == after)
        num_changed += int(differ.sum())
        num_compared += differ.numel()
        if differ.any():
            largest = max(largest, float((after - before)[differ].abs().nan_to_num(torch.inf).max()))
        tried.append(target)

    for cut in cuts(case, case.budget.cuts):
        compare(cut.first, cut.end, cut)
    window = case.base.batches[min(1, len(case.base.batches) - 1)][0]
    compare(window.start + window.score_from, window.start + window.length, None)
    detail = (
        f"replacing a target changed {num_changed:,} of {num_compared:,} probabilities of its own distribution"
        if num_changed
        else f"the distributions of {len(tried)} targets, {num_compared:,} probabilities, do not know their target"
    )
    return Finding.of(
        not num_changed,
        detail,
        targets=tried,
        probabilities_compared=num_compared,
        probabilities_changed=num_changed,
        largest_change_nats=largest,
    )
