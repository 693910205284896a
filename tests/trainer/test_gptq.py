"""GPTQ against the originals' codes and against the plain column loop, and what must hold of any codes.

golden/gptq.npz: Hessians are stored as their upper triangles. s1, s2: `gptq_quantize_weight` of #1217 and #1333 (and,
"1350", that of #1350 with half the damping); state: one layer of a whole state dict of #1217.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.artifact import gptq
from pgolf.artifact.gptq import Damping, factorise, quantise_together
from pgolf.artifact.quantise import Rounding, hessian_name, quantise_state, wanted_hessians
from pgolf.config import Config
from pgolf.errors import InputError

GOLDEN = np.load(Path(__file__).parent.parent / "golden/gptq.npz")
CASES = [k for k in GOLDEN.files if k[0] == "s" and k.endswith(("_q", "_q1350")) and not k.startswith("state")]
MATRIX = Rounding.of(Config(), "mlp")  # 6 bits, the search of five clips, the published floor


def golden_hessian(key: str) -> torch.Tensor:
    triangle = GOLDEN[key]
    size = int((2 * triangle.size) ** 0.5)
    h = np.zeros((size, size), np.float32)
    h[np.triu_indices(size)] = triangle
    return torch.from_numpy(h + np.triu(h, 1).T)


def correlated(width: int, seed: int = 0) -> torch.Tensor:
    """The Hessian of inputs of which a few directions hold most."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=g, dtype=torch.float64) * torch.logspace(0, -2, width).double()
    x = x @ torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    return (x.T @ x).float()


def column_loop(w: torch.Tensor, scale: torch.Tensor, h: torch.Tensor, share: float, code_max: int) -> torch.Tensor:
    """The published algorithm in float64, one column at a time, with U from the inverse itself."""
    h = h.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(share * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True, stable=True)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w = torch.where(dead, 0.0, w.double())[:, order].clone()
    q, s = torch.zeros_like(w), scale.double()
    for j in range(w.shape[1]):
        q[:, j] = (w[:, j] / s).round().clamp(-code_max, code_max)
        e = (w[:, j] - q[:, j] * s) / u[j, j]
        w[:, j:] -= e[:, None] * u[j, j:]
    result = torch.empty_like(q)
    result[:, order] = q
    return result.to(torch.int8)


def hessian_error(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, h: torch.Tensor) -> float:
    e = w.double() - codes.double() * scale.double()[:, None]
    return ((e @ h.double()) * e).sum().item()


# --- the originals ---


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_of_the_originals(case):
    kind, weights, inputs, *_ = case.split("_")
    w, h = torch.from_numpy(GOLDEN[f"{kind}_W_{weights}"]), golden_hessian(f"{kind}_H_{inputs}")
    code_max = 15 if "cr15" in case else 31
    how = Rounding.of(Config(mlp_bits=5 if code_max == 15 else 6), "mlp")
    factor = factorise(h, Damping(0.005 if case.endswith("1350") else 0.01))
    assert (factor is None) == (inputs == "indefinite")
    if factor is None:
        codes, scale = how.round(w)
    else:
        ((codes, scale),) = quantise_together([w], [how.scales(w)], factor, code_max)
    np.testing.assert_array_equal(codes.numpy(), GOLDEN[case])
    np.testing.assert_array_equal(scale.numpy(), GOLDEN[case.replace("_q", "_scale")])


def test_codes_of_a_whole_state_dict():
    """Its Hessian is stored with the first of two dampings in it."""
    scale = torch.from_numpy(GOLDEN["state_scale"])
    factor = factorise(golden_hessian("state_H"), Damping(0.01))
    ((codes, _),) = quantise_together([torch.from_numpy(GOLDEN["state_w"])], [scale[None]], factor, 31)
    np.testing.assert_array_equal(codes.numpy(), GOLDEN["state_q"])


# --- the plain loop ---


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (5, 17), (4, 128), (9, 129), (20, 300)])
@pytest.mark.parametrize("code_max", [15, 127])
def test_the_plain_loop(rows, width, code_max, monkeypatch):
    """One column, tails of both kinds of block, and panels that end inside a matrix."""
    monkeypatch.setattr(gptq, "PANEL_JOBS", 7)
    g = torch.Generator().manual_seed(width)
    w, h = torch.randn(rows, width, generator=g), correlated(width)
    scale = (w.abs().amax(1) / code_max).half()
    ((codes, chosen),) = quantise_together([w], [scale[None]], factorise(h, Damping(0.01)), code_max)
    assert chosen.equal(scale)
    assert codes.equal(column_loop(w, scale, h, 0.01, code_max))


def test_factor():
    """U^T U is the inverse of the damped H in the order of its diagonal; damping twice is damping what was damped."""
    h = correlated(40)
    for times in (1, 2, 3):
        factor = factorise(h, Damping(0.05, times))
        damped = h.double()
        for _ in range(times):
            damped = damped + 0.05 * damped.diagonal().mean() * torch.eye(40, dtype=torch.float64)
        assert factor.order.equal(h.diagonal().argsort(descending=True, stable=True))
        u = factor.upper.double()
        assert u.equal(u.triu())
        assert (u.diagonal() > 0).all()
        inverse = torch.linalg.inv(damped[factor.order][:, factor.order])
        torch.testing.assert_close(u.T @ u, inverse, rtol=1e-5, atol=1e-6 * inverse.abs().max().item())


def test_unseen_inputs_lose_their_weights():
    h = correlated(30)
    h[[3, 17]] = 0
    h[:, [3, 17]] = 0
    w = torch.randn(6, 30)
    ((codes, _),) = quantise_together([w], [MATRIX.scales(w)], factorise(h, Damping()), 31)
    assert not codes[:, [3, 17]].any()
    twice = factorise(h, Damping(times=2))  # the first damping leaves no zero on the diagonal, as in #1217
    assert not twice.dead.any()


def test_matrices_together_and_apart():
    """Sharing a panel changes nothing, nor does sharing scales with a neighbour; the choice is each matrix's own."""
    g = torch.Generator().manual_seed(1)
    heavy = torch.randn(40, 96, generator=g) * torch.randn(40, 96, generator=g).square()
    small = 0.1 * torch.randn(24, 96, generator=g)  # under the floor: all candidates are one
    mixed = torch.cat((small[:8], heavy[:8]))
    matrices, factor = [heavy, small, mixed], factorise(correlated(96), Damping())
    scales = [MATRIX.scales(w) for w in matrices]
    assert len({tuple(s.tolist()) for s in scales[0]}) == 5
    assert len({tuple(s.tolist()) for s in scales[1]}) == 1
    together = quantise_together(matrices, scales, factor, 31)
    for w, candidates, (codes, scale) in zip(matrices, scales, together, strict=True):
        alone = [quantise_together([w], [s[None]], factor, 31)[0] for s in candidates]
        errors = [(w.double() - c.double() * s.double()[:, None]).square().sum().item() for c, s in alone]
        best = errors.index(min(errors))
        assert codes.equal(alone[best][0])
        assert scale.equal(candidates[best])


# --- what must hold of any ---


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(8, 24),
    width=st.integers(24, 80),
    bits=st.integers(5, 8),
    clip=st.sampled_from(["search", "max", "quantile", "6"]),
    size=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_codes_lie_in_range_and_beat_rounding(seed, rows, width, bits, clip, size):
    config = Config(mlp_bits=bits, mlp_clip=clip, int6_floor=0.0, mlp_gptq=True, float16_max_values=0)
    name = "blocks.0.mlp.fc.weight"
    w = size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    h = correlated(width, seed)
    coded = quantise_state(config, {name: w}, {name: h})[name]
    assert coded.role == f"int{bits}"
    assert coded.values.abs().max() <= 2 ** (bits - 1) - 1
    assert (coded.scale > 0).all()
    assert coded.scale.isfinite().all()
    nearest = (w / coded.scale.float()[:, None]).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    ours, theirs = (hessian_error(w, q, coded.scale, h) for q in (coded.values, nearest))
    assert ours <= theirs


# --- the state dict, and bad input ---


def test_which_tensors_have_hessians():
    config = Config(attn_gptq=True, embed_gptq=True, float16_max_values=100)
    shapes = {
        "tok_emb.weight": (64, 32),
        "bigram.embed.weight": (64, 32),
        "bigram.proj.weight": (32, 32),
        "skip_weights": (5,),
        **{f"blocks.1.attn.{k}.weight": (32, 32) for k in ("c_q", "proj")},
        **{f"blocks.1.attn.{k}.weight": (16, 32) for k in ("c_k", "c_v")},
        "blocks.1.mlp.fc.weight": (64, 32),
        "blocks.1.mlp.proj.weight": (32, 64),
    }
    expected = {"tok_emb.weight": 32, "blocks.1.attn.c_q.weight": 32, "blocks.1.attn.proj.weight": 32}
    assert wanted_hessians(config, shapes) == expected
    assert hessian_name(config, "blocks.1.attn.c_v.weight", (16, 32)) == "blocks.1.attn.c_q.weight"
    assert wanted_hessians(config.replace(mlp_gptq=True, attn_gptq=False, embed_gptq=False), shapes) == {
        "blocks.1.mlp.fc.weight": 32,
        "blocks.1.mlp.proj.weight": 64,
    }
    assert wanted_hessians(Config(float16_max_values=100), shapes) == {}
    assert wanted_hessians(config.replace(float16_max_values=10**6), shapes) == {}


def test_a_state_dict():
    """Names, order and roles are those without GPTQ; only the codes of what has a Hessian are others."""
    config = Config(attn_gptq=True, float16_max_values=100, gptq_damping=0.02, gptq_damping_times=1)
    g = torch.Generator().manual_seed(3)
    state = {
        "blocks.0.attn.c_k.weight": torch.randn(16, 40, generator=g),
        "blocks.0.mlp.fc.weight": torch.randn(50, 40, generator=g),
        "skip_weights": torch.randn(2, 40, generator=g),
        "blocks.0.attn.c_q.weight": torch.randn(40, 40, generator=g),
        "tok_emb.weight": torch.randn(64, 40, generator=g),
    }
    h = correlated(40)
    done = []
    coded = quantise_state(config, state, {"blocks.0.attn.c_q.weight": h}, lambda *d: done.append(d))
    plain = quantise_state(config.replace(attn_gptq=False), state)
    assert list(coded) == list(plain) == list(state)
    assert done[-1] == (5, 5)
    for name in state:
        assert coded[name].role == plain[name].role
        assert coded[name].values.equal(plain[name].values) == (".attn." not in name)
    for name in ("blocks.0.attn.c_k.weight", "blocks.0.attn.c_q.weight"):
        assert coded[name].values.equal(column_loop(state[name], coded[name].scale, h, 0.02, 31))


def test_bad_hessians_are_named():
    config = Config(mlp_gptq=True, float16_max_values=100)
    name = "blocks.0.mlp.fc.weight"
    state, good = {name: torch.randn(20, 30)}, correlated(30)
    quantise_state(config, state, {name: good})
    bad, negative = good.clone(), good.clone()
    bad[2, 3] = float("nan")
    negative[4, 4] = -1.0
    for hessians, message in (
        (None, f"GPTQ needs the Hessian of {name}'s input, got none; calibrate"),
        ({"other": good}, f"GPTQ needs the Hessian of {name}'s input, got none"),
        ({name: good[:20, :20]}, rf"Hessian of {name} must be floating \(30, 30\), got torch.float32 \(20, 20\)"),
        ({name: good.long()}, r"must be floating \(30, 30\), got torch.int64"),
        ({name: bad}, f"the Hessian of {name} must be finite, got NaN"),
        ({name: negative}, "Hessian must not be negative, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            quantise_state(config, state, hessians)
    with pytest.raises(InputError, match=f"{name} must be finite, got NaN or infinity; the training run has diverged"):
        quantise_state(config, {name: state[name] / 0.0}, {name: good})
    with pytest.raises(InputError, match="every scale must fit float16 .65504., got a larger one; use a lower clip"):
        quantise_state(config.replace(mlp_clip="1e6"), {name: 100 * state[name]}, {name: good})


def test_an_indefinite_hessian_means_rounding():
    config = Config(mlp_gptq=True, float16_max_values=100)
    name = "blocks.0.mlp.fc.weight"
    w, h = torch.from_numpy(GOLDEN["s2_W_rows"]), golden_hessian("s2_H_indefinite")
    h.diagonal().clamp_(min=0)
    coded = quantise_state(config, {name: w}, {name: h})[name]
    np.testing.assert_array_equal(coded.values.numpy(), GOLDEN["s2_rows_indefinite_q"])
    np.testing.assert_array_equal(coded.scale.numpy(), GOLDEN["s2_rows_indefinite_scale"])


def test_the_config_refuses_what_gptq_cannot_do():
    for change, message in (
        ({"gptq_damping": 0.0}, "gptq_damping must lie between 0 and 1, got 0.0"),
        ({"gptq_damping_times": 0}, "gptq_damping_times must be at least 1, got 0"),
        (
            {"gptq_reserve_seconds": 600.0},
            "must leave some of max_seconds 600 for training, got 600",
        ),
        ({"calibration": "val"}, "calibration must be one of .'generated', 'train'., got 'val'"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
        ({"target_bytes": -1}, "target_bytes must be at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            Config().replace(**change)
