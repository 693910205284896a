"""Small artifacts for tests: the least tensors of each role, and what two of them must have in common.

A scalar and an empty tensor, one row, one column, three dimensions; codes of uneven rows and columns.
"""

import functools
import hashlib
import math

import torch

from pgolf.artifact import container, pack
from pgolf.artifact.quantise import CODE_MAX, CodedTensor
from pgolf.config import Config

TOKENIZER = hashlib.sha256(b"a tokenizer").hexdigest()


def coded(role: str, *shape: int) -> CodedTensor:
    if role == "float16":
        return CodedTensor(role, shape, torch.randn(shape).half())
    largest = CODE_MAX[role]
    rows, columns = shape[0], math.prod(shape[1:])
    codes = (torch.randn(rows, columns) * torch.rand(rows, 1) * torch.rand(columns) * largest).round()
    codes = codes.clamp(-largest, largest).to(torch.int8)
    return CodedTensor(role, shape, codes, torch.rand(rows).add(0.01).half())


def small_tensors() -> dict[str, CodedTensor]:
    return {
        "blocks.0.attn.c_q.weight": coded("int6", 5, 7),
        "bigram.scale": coded("float16"),
        "tok_emb.weight": coded("int8", 6, 4),
        "blocks.0.mlp.fc.weight": coded("int6", 1, 9),
        "nothing": coded("float16", 0, 3),
        "blocks.0.mlp.proj.weight": coded("int6", 8, 1),
        "skip_weights": coded("float16", 2, 3),
        "experts": coded("int8", 2, 3, 5),
    }


def small_content(**config: object) -> container.Content:
    return pack.make_content(Config().replace(**config), small_tensors(), TOKENIZER, {"note": ["any", {"json": 1.5}]})


@functools.cache
def seeded_content() -> container.Content:
    """The same in every process, so that hypothesis can replay a failure."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_content()


def assert_same(a: dict[str, CodedTensor], b: dict[str, CodedTensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        x, y = a[name], b[name]
        assert (x.role, tuple(x.shape)) == (y.role, tuple(y.shape))
        assert x.values.equal(y.values)
        assert (x.scale is None and y.scale is None) or x.scale.equal(y.scale)
