"""T1: replace one token of the stream; the score of every token before it must keep its bits, over the whole stream.

Tokens are flipped where windows and batches meet: in the first window, at the first and the last target of batches, at
the end of the stream, and at random. A test inside a single window would miss what leaks between windows.
"""

import torch

from .case import Case, Finding
from .passes import differing, flipped

NAME, TITLE, CONDITION = "T1", "Future flip", "C1"


def flip_positions(case: Case, generator: torch.Generator) -> list[int]:
    """Targets to flip, at least the second one: before the first there is nothing."""
    batches = case.base.batches
    spans = [(w.start + w.score_from, w.start + w.length) for windows in batches for w in windows]
    edges = [case.num_targets - 1, (spans[0][0] + spans[0][1]) // 2, spans[0][1] - 1, spans[0][1]]
    for windows in batches[1:2] + batches[-2:]:
        edges += [windows[0].start + windows[0].score_from, windows[-1].start + windows[-1].length - 1]
    wanted = list(dict.fromkeys(q for q in edges if 1 <= q < case.num_targets))[: max(case.budget.flips * 3 // 4, 1)]
    others = torch.randperm(case.num_targets - 1, generator=generator) + 1
    wanted += [q for q in others.tolist() if q not in wanted][: case.budget.flips - len(wanted)]
    return sorted(wanted)


def run(case: Case) -> Finding:
    if case.num_targets < 2:
        return Finding.not_run("one target has none before it")
    generator = case.generator(NAME)
    flips = flip_positions(case, generator)
    num_changed, num_compared, largest, first, num_effective = 0, 0, 0.0, None, 0
    for q in flips:
        shift = int(torch.randint(case.vocab_size - 1, (), generator=generator))
        after = case.run(flipped(case.tokens, q, case.vocab_size, shift), stop_after=q)
        count, size = differing(case.base.nll[:q], after.nll[:q])
        num_compared += q
        num_changed += count
        largest = max(largest, size)
        num_effective += bool(case.base.nll[q] != after.nll[q])
        if count and first is None:
            changed = (case.base.nll[:q] != after.nll[:q]).nonzero()[0].item()
            first = f"replacing target {q} changed the score of target {changed}"
    detail = first or f"{len(flips)} tokens replaced, the bits of all {num_compared:,} scores before them stayed"
    return Finding.of(
        not num_changed,
        detail,
        flips=flips,
        scores_compared=num_compared,
        scores_changed=num_changed,
        largest_change_nats=largest,
        flips_that_changed_their_own_score=num_effective,
    )
