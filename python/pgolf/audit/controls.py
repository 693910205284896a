"""Evaluators whose verdicts are known: eight that cheat, each in a way that has been published or submitted, and the
honest ones. `pgolf audit --controls` runs the auditor on all of them.

An auditor that has never failed anything proves nothing. CONTROLS lists, for each cheat, every test that must fail and,
by leaving the others out, those that must pass; `named` is the test that exists because of it. The model is tiny and
untrained, for leaks need no skill: they win bits on the model's own noise. T10 to T12 need data and an artifact.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from ..config import Config, nearest
from ..data.byte_counts import ByteCounts
from ..distributed import Ranks
from ..errors import InputError
from ..model import GPT
from ..scoring.gate import Batch, NllOf, TokenGate
from ..scoring.stream import BatchScorer, Frozen, Score, plan_batches, score_stream
from ..scoring.ttt import ScoreFirst
from ..scoring.windows import make_windows
from .case import Budget, Case
from .protocol import FREE, Evaluator, PgolfEvaluator
from .sampling import sample_stream
from .verdict import run_tests

VOCAB = 64
TINY = Config(
    vocab_size=VOCAB,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    rope_train_len=32,
    xsa_last_n=1,
    train_seq_len=32,
    train_batch_tokens=32,
    eval_seq_len=32,
    eval_stride=8,
    eval_batch_windows=8,
    slot_parameters="bias",  # all of SLOT's settings: the verdicts must not move with its defaults
    slot_optimizer="adamw",
    slot_lr=0.1,
    slot_steps=4,
    slot_beta1=0.9,
    slot_beta2=0.999,
    slot_eps=1e-5,
    slot_half_life=0.0,
    ttt_chunk_tokens=128,
    ttt_batch_seqs=4,
    ttt_lr=0.05,
    ttt_epochs=2,
    dtype="float32",
)


def tiny_model(seed: int = 0) -> GPT:
    """A random model whose predictions are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(TINY)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def tiny_bytes() -> ByteCounts:
    """One byte a token."""
    return ByteCounts(torch.ones(VOCAB, dtype=torch.int16), *(torch.zeros(VOCAB, dtype=torch.bool) for _ in range(2)))


class _Windows:
    """What the cheats that are written out below share: sliding windows of TINY, in batches, over one model."""

    partition = FREE

    def __init__(self, model: GPT):
        self.model = model

    def batches(self, gate: TokenGate, batch_windows: int | None) -> list[list]:
        cfg = self.model.cfg
        windows = make_windows(gate.num_targets, cfg.eval_seq_len, cfg.eval_stride)
        return plan_batches(windows, batch_windows or cfg.eval_batch_windows, 1, False)[0]

    def stream(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None, **parts) -> Score:
        cfg = self.model.cfg
        return score_stream(
            self.model,
            gate,
            tiny_bytes(),
            ranks,
            seq_len=cfg.eval_seq_len,
            stride=cfg.eval_stride,
            batch_windows=batch_windows or cfg.eval_batch_windows,
            **parts,
        )


class UpdatesFirst(_Windows):
    """Takes a step on a batch's targets and scores the batch with what came of it."""

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> Score:
        return self.stream(gate, ranks, batch_windows, scorer=_StepThenScore())


class _StepThenScore(BatchScorer):
    sequential = True

    def begin_slice(self) -> None:
        self.bias = torch.zeros(VOCAB)

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        logits, scored = model.logits(batch.inputs)[batch.scored], batch.scored

        def nll_of(targets: Tensor) -> Tensor:
            y = targets[scored]
            gradient = (logits + self.bias).softmax(-1).mean(0) - F.one_hot(y, VOCAB).float().mean(0)
            self.bias = self.bias - 4.0 * gradient
            return F.cross_entropy(logits + self.bias, y, reduction="none")

        return nll_of


class SkipsTokens(_Windows):
    """Leaves out every fourth window."""

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> None:
        scorer, seq_len = Frozen(), self.model.cfg.eval_seq_len
        gate.watch(self.model)
        batches = self.batches(gate, batch_windows)
        for windows in batches[ranks.rank :: ranks.world_size]:
            if kept := [w for w in windows if (w.start // self.model.cfg.eval_stride) % 4 != 3]:
                batch = gate.open(kept, seq_len)
                with torch.no_grad():
                    gate.score(batch, scorer(self.model, batch))


class Rescores(_Windows):
    """Trains on the text behind its scores, as allowed, then scores it all again and reports that."""

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> Score:
        cfg = self.model.cfg.replace(ttt_chunk_tokens=max(gate.num_targets, self.model.cfg.eval_seq_len), ttt_epochs=4)
        learner = ScoreFirst(cfg)
        self.stream(gate, Ranks(0, 1, ranks.device), batch_windows, learner=learner)
        learner.train(0, gate, Ranks(0, 1, ranks.device))
        scorer, seq_len = Frozen(), cfg.eval_seq_len
        trained = learner.model.requires_grad_(False)
        for windows in self.batches(gate, batch_windows):
            batch = gate.open(windows, seq_len)
            gate.score(batch, scorer(trained, batch))


class HashedMixture(_Windows):
    """Adds to a token's probability what a hash table of (previous token, token) has counted; buckets collide."""

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> Score:
        return self.stream(gate, ranks, batch_windows, scorer=_AddHashed())


class _AddHashed(BatchScorer):
    NUM_BUCKETS = 61

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        logits, scored = model.logits(batch.inputs)[batch.scored], batch.scored
        previous, log_p = batch.inputs[scored], logits.log_softmax(-1)
        windows = [w for w in batch.windows for _ in range(w.score_from, w.length)]
        indices = [w.start + p for w in batch.windows for p in range(w.score_from, w.length)]
        prefix = batch.prefix()
        counts = []  # of each scored position, what the window's tokens before it left in the table
        for w, index in zip(windows, indices, strict=True):
            pairs = prefix[w.start : index] * 31 + prefix[w.start + 1 : index + 1]
            counts.append(torch.bincount(pairs % self.NUM_BUCKETS, minlength=self.NUM_BUCKETS))
        table = torch.stack(counts)

        def nll_of(targets: Tensor) -> Tensor:
            y = targets[scored]
            bucket = (previous * 31 + y) % self.NUM_BUCKETS
            share = table.gather(1, bucket[:, None])[:, 0] / (table.sum(1) + 1)
            return -torch.log(log_p.gather(1, y[:, None])[:, 0].exp() + 0.2 * share)

        return nll_of


class Control(NamedTuple):
    """make: from a model to an evaluator. fails: the tests that must fail. named: the one that is there for it."""

    title: str
    make: Callable[[GPT], Evaluator]
    fails: frozenset[str] = frozenset()
    named: str | None = None


def _pgolf(method: str, **fields: object) -> Callable[[GPT], Evaluator]:
    return lambda model: PgolfEvaluator(method, TINY.replace(**fields), model, tiny_bytes())


_JOINT = {"slot_optimizer": "lbfgs-joint", "slot_steps": 1, "slot_max_iter": 4, "slot_lr": 1.0}
CONTROLS = {
    "shared-context": Control(
        "SLOT on the context alone, one fit for a batch of windows",
        _pgolf("slot", slot_share="shared-context"),
        frozenset({"T1", "T2", "T3", "T4", "T7", "T9"}),
        "T1",
    ),
    "shared-all": Control(
        "SLOT on all positions, one fit for a batch of windows",
        _pgolf("slot", slot_share="shared-all"),
        frozenset({"T1", "T2", "T3", "T4", "T7", "T9"}),
        "T7",
    ),
    "scored": Control(
        "SLOT on the scored positions, one fit per window",
        _pgolf("slot", slot_share="scored"),
        frozenset({"T1", "T2", "T3", "T7", "T9"}),
        "T2",
    ),
    "joint-lbfgs": Control(
        "SLOT on each window's context, one L-BFGS for the batch",
        _pgolf("slot", **_JOINT),
        frozenset({"T1", "T2", "T3", "T4"}),
        "T4",
    ),
    "updates-first": Control(
        "a step on a batch's targets before they are scored",
        UpdatesFirst,
        frozenset({"T1", "T2", "T3", "T4", "T5", "T6", "T9"}),
        "T6",
    ),
    "skips": Control("every fourth window is left out", SkipsTokens, frozenset({"T8"}), "T8"),
    "rescores": Control(
        "the text is scored again by what was trained on all of it",
        Rescores,
        frozenset({"T1", "T2", "T3", "T8", "T9"}),
        "T8",
    ),
    "hashed-mixture": Control(
        "a hashed n-gram table adds to the target's probability",
        HashedMixture,
        frozenset({"T5", "T9"}),
        "T5",
    ),
    "plain": Control("windows without overlap", _pgolf("plain")),
    "sliding": Control("sliding windows", _pgolf("sliding")),
    "slot-cache": Control("SLOT, a cache of each window's context", _pgolf("slot", slot_parameters="cache")),
    "slot-cache-carried": Control(
        "SLOT, a cache carried behind the scores", _pgolf("slot", slot_parameters="cache", slot_share="carried")
    ),
    "slot-window": Control("SLOT, a fit per window on its context", _pgolf("slot")),
    "slot-frontier": Control("SLOT, one fit for a batch up to its frontier", _pgolf("slot", slot_share="frontier")),
    "slot-carried": Control("SLOT, one fit carried behind the scores", _pgolf("slot", slot_share="carried")),
    "ttt": Control("score-first test-time training", _pgolf("ttt")),
}
TESTED = ("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9")
BUDGET = Budget(flips=6, cuts=2, positions=8, rank_processes=False)
NUM_TARGETS = 448


def run_controls(
    names: Sequence[str] = (), seed: int = 0, on_control: Callable[[str, int, int], None] | None = None
) -> list[dict]:
    """Audit the controls (all, or those named) on a stream of the tiny model's own.

    Args:
        on_control: called with (name, done, of how many).

    Returns:
        For each {"name", "title", "named", "tests": as in audit.json, "expected": tests that must fail, "as_expected"}.

    Raises:
        InputError: an unknown name.
    """
    for name in names:
        if name not in CONTROLS:
            raise InputError(f"audit: no control {name!r}{nearest(name, CONTROLS)}; there are {', '.join(CONTROLS)}")
    model, device = tiny_model(), torch.device("cpu")
    sampled = sample_stream(model, TINY, 1, NUM_TARGETS, torch.Generator().manual_seed(seed))
    results, wanted = [], list(names or CONTROLS)
    for done, name in enumerate(wanted):
        if on_control:
            on_control(name, done, len(wanted))
        control = CONTROLS[name]
        case = Case(
            evaluator=control.make(model),
            tokens=sampled[0],
            vocab_size=VOCAB,
            byte_counts=tiny_bytes(),
            device=device,
            seed=seed,
            # Training exchanges gradients: its ranks must be real ones.
            budget=dataclasses.replace(BUDGET, rank_processes=name == "ttt"),
            source=model,
            cfg=TINY,
            sampled=sampled,
        )
        tests = [test for test in run_tests(case, TESTED) if test["name"] in TESTED]
        verdicts = {test["name"]: test["verdict"] for test in tests}
        expected = {test: "fail" if test in control.fails else "pass" for test in TESTED}
        results.append(
            {
                "name": name,
                "title": control.title,
                "named": control.named,
                "tests": tests,
                "expected": sorted(control.fails),
                "as_expected": verdicts == expected,
            }
        )
    if on_control:
        on_control("done", len(wanted), len(wanted))
    return results


def table(results: list[dict]) -> Table:
    """Controls by tests, for a terminal; what is not as expected is marked."""
    shown = Table("control", *TESTED, "as expected")
    for r in results:
        words = [test["verdict"] + ("*" if test["name"] == r["named"] else "") for test in r["tests"]]
        shown.add_row(r["name"], *words, "yes" if r["as_expected"] else "[bold red]no[/]")
    shown.caption = "* the test that is there because of this control"
    return shown


def expected_table() -> str:
    """What CONTROLS expects, as a Markdown table."""
    lines = ["| control | " + " | ".join(TESTED) + " |", "|---" * (len(TESTED) + 1) + "|"]
    for name, control in CONTROLS.items():
        cells = ["**fail**" if t == control.named else "fail" if t in control.fails else "pass" for t in TESTED]
        lines.append(f"| `{name}`: {control.title} | {' | '.join(cells)} |")
    return "\n".join(lines)
