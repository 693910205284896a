"""Which steps are taken between two products with X: the blocks of the Gram form.

With R = X X^T, the steps of a block are together X <- P X, where the polynomial P of R takes products of symmetric
matrices only. Fewer products with X are less arithmetic when X is long, at a price: a block multiplies small singular
values by p, the product of its steps' a, and with them the rounding errors of R. Hence a bound on p.
"""

import functools
import math

Steps = tuple[tuple[float, float, float], ...]

FIRST_GROWTH, LATER_GROWTH = 64.0, 16.0  # largest p of the first and of later blocks: quintic 3 + 2, polar 2 + 2 + 1


@functools.cache
def blocks_of(
    steps: Steps, first_growth: float = FIRST_GROWTH, later_growth: float = LATER_GROWTH
) -> tuple[Steps, ...]:
    """The steps (a, b, c) in blocks as long as the bounds on their growth allow; a single step needs no permission."""
    blocks, growth, bound = [], math.inf, first_growth
    for step in steps:
        growth *= abs(step[0])
        if growth <= bound:
            blocks[-1] += (step,)
        else:
            bound = later_growth if blocks else first_growth
            blocks.append((step,))
            growth = abs(step[0])
    return tuple(blocks)


def single_steps(steps: Steps) -> tuple[Steps, ...]:
    """The standard iteration: every step a block of its own."""
    return tuple((step,) for step in steps)
