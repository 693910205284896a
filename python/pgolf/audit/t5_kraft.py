"""T5: put every token of the vocabulary into a target's slot and score it: the probabilities must sum to 1.

Catches what hands out more than it has: hashed n-grams whose buckets collide, bonuses for a target alone, mixtures over
another alphabet. They look like good scores, one target at a time.
"""

import torch

from .case import Case, Finding
from .vocabulary import cuts, distributions

NAME, TITLE, CONDITION = "T5", "Kraft sum by substitution", "C2"
TOLERANCE = 1e-4


def run(case: Case) -> Finding:
    generator, places = case.generator(NAME), cuts(case, case.budget.cuts)
    sums, mismatched = [], 0
    for i, cut in enumerate(places):
        count = case.budget.positions * (i + 1) // len(places) - case.budget.positions * i // len(places)
        chosen = torch.randperm(cut.end - cut.first, generator=generator)[:count] + cut.first
        targets = sorted(chosen.tolist())
        log_p, gate = distributions(case, case.tokens, cut, targets)
        sums.append(log_p.exp().sum(1))
        true = log_p[torch.arange(len(targets)), case.tokens[torch.tensor(targets) + 1]]
        mismatched += int((-true != gate.nll[targets]).sum())
    sums = torch.cat(sums)
    error = float((sums - 1).abs().nan_to_num(torch.inf).max())
    if mismatched:
        detail = f"{mismatched} scores are not what the same token got as a substitute"
    elif error > TOLERANCE:
        worst = float(sums[(sums - 1).abs().nan_to_num(torch.inf).argmax()])
        detail = f"the probabilities of the whole vocabulary sum to {worst:.6g} at one of {len(sums)} positions"
    else:
        detail = f"at {len(sums)} positions the {case.vocab_size:,} probabilities sum to 1, off by {error:.1e} at most"
    return Finding.of(
        error <= TOLERANCE and not mismatched,
        detail,
        positions=len(sums),
        vocabulary=case.vocab_size,
        largest_sum=float(sums.max()),
        smallest_sum=float(sums.min()),
        scores_unlike_their_substitute=mismatched,
    )
