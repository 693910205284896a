"""The validation stream of a dataset, and its plain score: windows that do not overlap, as while training."""

import torch

from ..config import Config
from ..data.dataset import Dataset
from ..distributed import Ranks
from ..model import GPT
from .stream import Score, score_stream


def validation_tokens(cfg: Config, dataset: Dataset, limit: int = 0) -> torch.Tensor:
    """The validation stream, [N + 1] int64: whole, or as cfg.drop_val_tail and `limit` (targets; 0: all) cut it."""
    tokens = dataset.val_tokens(cfg.eval_seq_len if cfg.drop_val_tail else 0)
    if limit:
        tokens = tokens[: limit + 1]
    return torch.from_numpy(tokens.astype("int64"))


def plain_score(model: GPT, dataset: Dataset, cfg: Config, ranks: Ranks) -> Score:
    """Every token with the context its window happens to hold; at most cfg.val_tokens targets."""
    return score_stream(
        model,
        validation_tokens(cfg, dataset, cfg.val_tokens),
        dataset.byte_counts,
        ranks,
        seq_len=cfg.eval_seq_len,
        stride=cfg.eval_seq_len,
        batch_windows=cfg.eval_batch_windows,
    )
