"""What the tests of scoring share: the tiny published models and their text, stand-ins for a model, the flip test."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import Config
from pgolf.data.byte_counts import ByteCounts
from pgolf.data.tokenizer import Tokenizer
from pgolf.distributed import Ranks
from pgolf.model import GPT
from pgolf.scoring.gate import Batch, TokenGate
from pgolf.scoring.stream import BatchScorer
from pgolf.scoring.windows import Window

GOLDEN = Path(__file__).parent.parent / "golden"
ONE_RANK = Ranks(0, 1, torch.device("cpu"))
TINY = Config(
    vocab_size=420,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    qk_gain_init=1.5,
    xsa_last_n=4,
    bigram_vocab_size=96,
    bigram_dim=12,
    ve_dim=12,
    ve_layers=(2, 3),
    train_seq_len=64,
    train_batch_tokens=64,
    eval_seq_len=64,
    eval_stride=16,
    eval_batch_windows=16,
    slot_parameters="delta",
    slot_steps=8,
    slot_lr=0.005,
    slot_beta1=0.9,
    slot_beta2=0.999,
    slot_eps=1e-5,
    slot_half_life=0.0,
)
SYSTEMS = {
    "pr549": TINY,
    "pr1217": TINY.replace(skip_gates=True),
    "pr675": TINY.replace(value_residual=True),
    "pr1333": TINY.replace(
        bigram_vocab_size=0,
        smear_gate=False,
        skip_gates=True,
        rope_train_len=64,
        recur_layers=(1, 2),
        parallel_start_layer=3,
    ),
}

# The forms of SLOT by the letters that the golden arrays call them.
SLOT_SYSTEMS = {
    "a": "pr1128",
    "b": "pr1217",
    "c1": "pr1217-shape",
    "c2": "pr1217-window",
    "d": "pr1333",
    "e": "pr1313",
    "f": "pr675",
    "g": "pr1350",
    "x": "pr1240",
}


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def trained_model(system: str, arrays: dict[str, np.ndarray], prefix: str = "w:", dtype=torch.float64) -> GPT:
    """The published code's trained model of a system, ready to score."""
    model = GPT(SYSTEMS[system])
    weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
    (model.load_state_dict if "qo_bank" in weights else model.load_export)(weights)
    model.activation_dtype = dtype
    return model.to(dtype).requires_grad_(False)


def validation_text() -> tuple[Tensor, ByteCounts]:
    """The validation tokens [1473] of the tiny models, and what their bytes are counted with."""
    arrays = load("tokenizer")
    byte_counts = ByteCounts.from_tokenizer(Tokenizer(arrays["spm_model_proto"].tobytes()))
    return torch.from_numpy(arrays["val_tokens"]).long(), byte_counts


class FixedStates:
    """A model whose hidden states of the one batch it is asked for are known."""

    def __init__(self, states: Tensor, weight: Tensor, softcap: float):
        self.states, self.weight, self.cfg = states, weight, SimpleNamespace(logit_softcap=softcap)

    def hidden(self, ids: Tensor) -> Tensor:
        assert ids.shape == self.states.shape[:2]
        return self.states

    trunk = hidden

    def head_weight(self) -> Tensor:
        return self.weight


class ThreeTokenModel:
    """A strictly causal model without layers: a state is a sum of the last three embeddings of its window."""

    def __init__(self, arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64):
        self.embedding, self.weight, self.gain = (torch.from_numpy(arrays[k]).to(dtype) for k in ("E", "W", "gain"))
        self.cfg = SimpleNamespace(logit_softcap=30.0)

    def _sum(self, ids: Tensor) -> Tensor:
        e = self.embedding[ids]
        return 0.8 * e + 0.5 * F.pad(e[:, :-1], (0, 0, 1, 0)) + 0.3 * F.pad(e[:, :-2], (0, 0, 2, 0))

    def hidden(self, ids: Tensor) -> Tensor:
        total = self._sum(ids)
        return total * (total.square().mean(-1, keepdim=True) + torch.finfo(total.dtype).eps).rsqrt()

    def trunk(self, ids: Tensor) -> Tensor:
        return self._sum(ids) * self.gain[ids][..., None]

    def head_weight(self) -> Tensor:
        return self.weight


def no_bytes(vocab_size: int) -> ByteCounts:
    """Byte counts of a vocabulary that stands for no text."""
    return ByteCounts(*(torch.zeros(vocab_size, dtype=d) for d in (torch.int16, torch.bool, torch.bool)))


def score_batch(scorer: BatchScorer, model, x: Tensor, y: Tensor, scored: Tensor, windows: list[Window]) -> Tensor:
    """One batch of known inputs and targets through a scorer, leaks and all."""
    gate = TokenGate(torch.zeros(windows[-1].start + windows[-1].length + 1, dtype=torch.int64), strict=False)
    batch = Batch(windows, x, scored, gate, x, y, scored)
    with torch.no_grad():
        return gate.score(batch, scorer(model, batch))


def flip_changes(
    score: Callable[[Tensor], Tensor], tokens: Tensor, target_of: Tensor, flips: list[int], vocab_size: int
) -> Tensor:
    """Replace one token of the stream at a time and score everything anew: the change of every score.

    Args:
        score: stream [N + 1] -> nll of every scored instance [n], in one order.
        target_of: [n], which token of the stream each instance predicts.
        flips: the tokens to replace, each by its successor in the vocabulary.

    Returns:
        [flips, n]: the change of scores of tokens before the flipped one, NaN for the others, which may change.
    """
    before = score(tokens)
    changes = torch.full((len(flips), len(before)), torch.nan, dtype=torch.float64)
    for i, flip in enumerate(flips):
        changed = tokens.clone()
        changed[flip] = (changed[flip] + 1) % vocab_size
        after, earlier = score(changed), target_of < flip
        assert not torch.equal(after[~earlier], before[~earlier]), "the flip changed nothing at all"
        changes[i, earlier] = (after - before)[earlier].double()
    return changes
