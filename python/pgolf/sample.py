"""Text from an artifact: `pgolf sample ARTIFACT --prompt TEXT`. The tokens come from generate.py.

An artifact names its tokenizer by hash only, so the model file has to lie beside it, as in a run directory, or the
dataset has to be named.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pgolf_kernels import Int6Weight

from . import distributed, run
from .artifact.container import Content
from .artifact.pack import read_content
from .data.dataset import Dataset
from .data.tokenizer import Tokenizer
from .errors import InputError
from .evaluate import build_model
from .generate import generate


def sample(
    artifact: Path,
    prompt: str = "",
    *,
    data: Path | None = None,
    num_samples: int = 1,
    num_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Texts that begin with `prompt`, as a document of the training data would.

    Args:
        data: the dataset of the artifact's run, for its tokenizer; None: tokenizer.model beside the artifact.
        num_tokens: per text, behind the prompt.
        temperature, top_k, top_p, seed: see `generate`.

    Returns:
        {"samples": texts, "prompt_tokens", "tokens" (sampled, of all texts), "seconds", "tokens_per_second", "device",
        "settings"}.

    Raises:
        InputError: no tokenizer, not the artifact's tokenizer, or an argument out of range.
    """
    if num_samples < 1:
        raise InputError(f"sample: the number of texts must be at least 1, got {num_samples}")
    if prompt.encode(errors="replace").decode() != prompt:
        raise InputError(f"sample: the prompt must be text in the terminal's encoding, got {prompt!r}")
    ranks = distributed.start(device)
    try:
        content = read_content(artifact)
        tokenizer = find_tokenizer(artifact, content, data)
        model = build_model(artifact, content, ranks.device)
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        started = time.perf_counter()
        out = generate(
            model,
            torch.tensor(ids, device=ranks.device).repeat(num_samples, 1),
            num_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            packed=packed_matrices(content),
            on_progress=on_progress,
        ).tolist()
        seconds = time.perf_counter() - started
    finally:
        distributed.stop()
    return {
        "samples": [tokenizer.decode(row) for row in out],
        "prompt_tokens": len(ids),
        "tokens": num_samples * num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_samples * num_tokens / seconds),
        "device": ranks.device.type,
        "settings": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
    }


def find_tokenizer(artifact: Path, content: Content, data: Path | None) -> Tokenizer:
    """The tokenizer that an artifact was trained with; `data` as in `sample`."""
    path = artifact.parent / run.TOKENIZER if data is None else data
    if data is not None:
        tokenizer = Dataset.open(data, vocab_size=content.header.config.vocab_size).tokenizer
    elif path.is_file():
        tokenizer = Tokenizer(path)
    else:
        raise InputError(f"{artifact}: no {run.TOKENIZER} beside it; name the data of its run with --data")
    if tokenizer.sha256 != content.header.tokenizer_sha256:
        raise InputError(f"{path}: its tokenizer is not the one that {artifact} was trained with; use that of its run")
    return tokenizer


def packed_matrices(content: Content) -> dict[str, Int6Weight]:
    """The tensors of an artifact whose codes fit six bits, as int6_linear takes them, by name."""
    return {
        name: Int6Weight.from_codes(tensor.values, tensor.scale)
        for name, tensor in content.tensors.items()
        if tensor.role in ("int5", "int6")
    }
