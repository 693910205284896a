"""T9: sample a stream from the frozen model itself and let the evaluator score it: whoever beats the model has peeked.

Let p be the model's probabilities, from which the stream is drawn, and q the evaluator's. If every q_t depends on the
tokens before t alone and sums to at most 1, then E[q_t / p_t | past] <= 1: M_T = prod_{t <= T} q_t / p_t is a
non-negative supermartingale that starts at 1, and by Ville's inequality P(sup_T M_T >= 1 / a) <= a. So an evaluator
that is ever log2(1 / a) bits ahead of the model is shown to break one of the conditions, at level a, with no threshold
to tune. There is nothing to learn in such a stream, so an honest evaluator loses a little. Passing proves nothing.

The bits are counted against the plain sliding score of the same stream, so the unadapted evaluator wins exactly 0. That
score and the float64 probabilities that tokens were drawn with differ by rounding; the difference is taken off.
"""

import math

import torch

from ..distributed import Ranks
from .case import Case, Finding
from .passes import run_pass
from .protocol import PgolfEvaluator
from .sampling import sample_stream

NAME, TITLE, CONDITION = "T9", "Self-sample martingale", "C1"


def run(case: Case) -> Finding:
    if case.source is None:
        return Finding.not_run("there is no frozen model to sample from")
    count = len(case.sampled[1]) if case.sampled else case.budget.sample_tokens or case.num_targets
    tokens, log_p = case.sampled or sample_stream(
        case.source, case.cfg, int(case.tokens[0]), count, case.generator(NAME)
    )
    exact = case.cfg.replace(eval_windows="exact")
    plain = run_pass(PgolfEvaluator("sliding", exact, case.source, case.byte_counts), tokens, case.device).nll
    scored = run_pass(case.evaluator, tokens, case.device, Ranks(0, 1, case.device)).nll
    won = torch.where(scored.isnan(), 0.0, plain - scored).cumsum(0) / math.log(2)
    rounding = float((plain + log_p).cumsum(0).abs().max()) / math.log(2)
    needed_bits, most = -math.log2(case.budget.level), float(won.max())
    leak = not most - rounding < needed_bits  # NaN is no alibi
    total = float(plain.sum()) / math.log(2)
    stream = f"of {count:,} tokens of the model's own, {total:,.0f} bits,"
    detail = (
        f"{stream} {most:.1f} were saved, which proves a leak at level 2^-{math.floor(most - rounding)}"
        if leak
        else f"{stream} {max(most, 0.0):.2f} were saved at most; {needed_bits:.1f} would prove a leak at level "
        f"{case.budget.level:g}"
    )
    return Finding.of(
        not leak,
        detail,
        tokens=count,
        model_bits=total,
        bits_won=float(won[-1]),
        most_bits_won=most,
        bits_that_prove_a_leak=needed_bits,
        level=case.budget.level,
        rounding_bits=rounding,
    )
