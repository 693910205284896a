"""Decoding against the full forward, for every option of a config.

The full forward is the oracle: a cache that forgets, repeats or shifts anything moves hidden states by whole units.
"""

import random

import pytest
import torch
from numerics import DEVICES, assert_as_accurate
from test_model import SMALL, SYSTEMS

from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.generate import generate
from pgolf.kv_cache import WINDOW, KVCache
from pgolf.model import GPT
from pgolf_kernels import quantize_int6

TINY = SMALL.replace(num_layers=2, model_dim=32, bigram_vocab_size=64, bigram_dim=8, ve_layers=(1,), xsa_last_n=1)


def random_model(cfg: Config, dtype=torch.float64, device="cpu", seed=0) -> GPT:
    """Every parameter random, so that no part is silent; gains and gates around their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(cfg).to(device).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return use_dtype(model, dtype)


def use_dtype(model: GPT, dtype: torch.dtype) -> GPT:
    model.activation_dtype = dtype
    return model.to(torch.float64 if dtype == torch.float64 else torch.float32)


def random_ids(model: GPT, *shape: int, seed=1) -> torch.Tensor:
    ids = torch.randint(model.cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return ids.to(model.tok_emb.weight.device)


def decode(model: GPT, ids: torch.Tensor, num_prefilled: int, window=None, max_tokens=None, packed=None):
    """Hidden states of every position: of the first num_prefilled at once, then of one after the other."""
    cache = KVCache(model, len(ids), max_tokens or ids.shape[1], packed)
    states = [model.hidden(ids[:, :num_prefilled], cache)]
    cache.window = window
    states += [model.hidden(ids[:, t : t + 1], cache) for t in range(num_prefilled, ids.shape[1])]
    assert cache.num_tokens == cache.position.item() == ids.shape[1]
    return torch.cat(states, 1)


def padded(ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, num_tokens - ids.shape[1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("num_prefilled", [1, 5, 31])  # a step at once, in between, and hardly any
@pytest.mark.parametrize("name", SYSTEMS)
def test_decoding_is_the_full_forward(name, num_prefilled, window, device):
    model = random_model(SYSTEMS[name], device=device)
    ids = random_ids(model, 3, 32)
    full = model.hidden(ids)
    torch.testing.assert_close(decode(model, ids, num_prefilled, window), full, rtol=0, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_decoding_is_as_accurate_as_the_full_forward(name, dtype, device):
    model = random_model(SYSTEMS[name], dtype, device)
    ids = random_ids(model, 4, 32)
    full = model.hidden(ids)
    ours = [decode(model, ids, 3, window) for window in (None, WINDOW)]
    exact = use_dtype(model, torch.float64).hidden(ids)
    for hidden in ours:
        assert_as_accurate(hidden, full, exact, scale=exact.abs().max().item())


def random_config(rng: random.Random) -> Config:
    num_layers, num_kv_heads, group = rng.randint(1, 6), rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    layers = range(num_layers)
    first = rng.choice(layers)
    return Config(
        vocab_size=rng.choice([2, 37, 128]),
        num_layers=num_layers,
        model_dim=(head_dim := rng.choice([4, 8, 12])) * num_kv_heads * group,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        mlp_mult=rng.choice([1.0, 2.5]),
        rope_dims=rng.choice([0, 2, 4, head_dim]),
        rope_train_len=rng.choice([4, 16, 1024]),
        ln_scale=rng.random() < 0.5,
        xsa_last_n=rng.randint(0, num_layers),
        bigram_vocab_size=rng.choice([0, 2, 50]),
        bigram_dim=5,
        smear_gate=rng.random() < 0.5,
        skip_gates=rng.random() < 0.5,
        ve_dim=rng.choice([0, 6]),
        ve_layers=tuple(sorted(rng.sample(layers, rng.randint(0, num_layers)))),
        value_residual=rng.random() < 0.5,
        recur_layers=tuple(range(first, rng.randint(first, num_layers))),
        parallel_start_layer=rng.choice(layers),
        train_seq_len=24,
        train_batch_tokens=24,
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_combination_of_options_decodes(seed):
    rng = random.Random(seed)
    model = random_model(random_config(rng), seed=seed)
    ids = random_ids(model, rng.choice([1, 2]), 24)
    decoded = decode(model, ids, rng.randint(1, 23), rng.choice([None, WINDOW]))
    torch.testing.assert_close(decoded, model.hidden(ids), rtol=0, atol=1e-11)


def test_the_rotary_table_is_that_of_the_training_length_or_of_all_tokens():
    """12 tokens after training on 32 use the base of 32, not of 12; 40 tokens use that of 40 from the first one on."""
    model = random_model(TINY.replace(rope_train_len=8, train_seq_len=32))
    ids = random_ids(model, 2, 40)
    short, trained, long = model.hidden(ids[:, :12]), model.hidden(ids[:, :32]), model.hidden(ids)
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(decode(model, ids[:, :12], 5), trained[:, :12], **close)
    torch.testing.assert_close(decode(model, ids[:, :32], 5), trained, **close)
    torch.testing.assert_close(decode(model, ids[:, :12], 5, max_tokens=40), long[:, :12], **close)
    assert (short - trained[:, :12]).abs().max() > 0.01, "the lengths do not differ in what this test is about"
    assert (long[:, :12] - trained[:, :12]).abs().max() > 0.01

    # and generate asks for the table of the whole result
    for num_tokens, table in ((7, 32), (35, 40)):
        greedy = generate(model, ids[:, :5], num_tokens, temperature=0)
        logits = model.logits(padded(greedy, table))
        assert torch.equal(greedy[:, 5:], logits[:, 4 : 4 + num_tokens].argmax(-1))


def int6_matrices(model: GPT) -> dict:
    """The model's matrices packed; the model is left with what they stand for."""
    state = {name: w.clone() for name, w in model.export_state().items()}
    packed = {
        name: quantize_int6(w, "max", 0.0) for name, w in state.items() if name.startswith("blocks.") and w.dim() == 2
    }
    packed = {name: w for name, w in packed.items() if "resid_mix" not in name}
    model.load_export(state | {name: w.dequantize() for name, w in packed.items()})
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["", "attn.c_k", "mlp.proj"])  # not packed: none; one of the three that are joined
def test_packed_matrices_are_as_accurate_as_dense_ones(dtype, kept):
    model = random_model(SYSTEMS["pr1217"], dtype)
    packed = {name: w for name, w in int6_matrices(model).items() if not kept or kept not in name}
    ids = random_ids(model, 4, 32)
    full, ours = model.hidden(ids), decode(model, ids, 3, packed=packed)
    exact = use_dtype(model, torch.float64).hidden(ids)
    assert_as_accurate(ours, full, exact, scale=exact.abs().max().item())


def test_a_cache_refuses_what_it_cannot_hold():
    model = random_model(TINY)
    with pytest.raises(InputError, match="must be at least 1, got 0 and 4"):
        KVCache(model, 0, 4)
    with pytest.raises(InputError, match="at most 4 positions fit, got 0 \\+ 5"):
        model.hidden(random_ids(model, 1, 5), KVCache(model, 1, 4))
    cache = KVCache(model, 1, 4)
    model.hidden(random_ids(model, 1, 2), cache)
    with pytest.raises(InputError, match="come one at a time, got 2"):
        model.hidden(random_ids(model, 1, 2), cache)
