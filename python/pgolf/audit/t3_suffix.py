"""T3: replace the rest of the stream by noise, or cut it off; every score before keeps its bits.

Finds what uses statistics of the whole text, or its order. Where the cut of windows into batches is part of the method,
the stream ends with a batch. Its length stays known: a learning rate may follow it, as that of test-time training does.
"""

import torch

from .case import Case, Finding
from .passes import differing
from .protocol import BY_LENGTH, FREE

NAME, TITLE, CONDITION = "T3", "Suffix noise and truncation", "C1"


def run(case: Case) -> Finding:
    generator, N, partition = case.generator(NAME), case.num_targets, case.evaluator.partition
    if N < 2:
        return Finding.not_run("one target has none before it")
    places = sorted({max(N * i // (case.budget.cuts + 1), 1) for i in range(1, case.budget.cuts + 1)})
    num_changed, largest, broken = 0, 0.0, []

    def compare(what: str, q: int, after: torch.Tensor) -> None:
        nonlocal num_changed, largest
        count, size = differing(case.base.nll[:q], after[:q])
        num_changed += count
        largest = max(largest, size)
        if count:
            broken.append(f"{what} from target {q} on changed {count:,} scores before it")

    for q in places:
        noisy = case.tokens.clone()
        noisy[q + 1 :] = torch.randint(case.vocab_size, (N - q,), generator=generator)
        compare("noise", q, case.run(noisy, stop_after=q).nll)
    ends = [max(w.start + w.length for w in windows) for windows in case.base.batches]
    cut_at = places if partition == FREE else sorted({min(ends, key=lambda e: abs(e - q)) for q in places} - {N})
    cut_at = [] if partition == BY_LENGTH else cut_at
    for q in cut_at:
        compare("the cut", q, case.run(case.tokens[: q + 1]).nll)
    held = f"noise from {len(places)} places on and {len(cut_at)} cuts left the bits of every score before them"
    if partition == BY_LENGTH:
        held = f"noise from {len(places)} places on left the bits of every score before; batches depend on the length"
    return Finding.of(
        not num_changed,
        broken[0] if broken else held,
        noise_from=places,
        cut_at=cut_at,
        scores_changed=num_changed,
        largest_change_nats=largest,
    )
