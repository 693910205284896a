"""What users get wrong: every public op answers with a sentence that names the argument, before it computes anything.

Tensors on a GPU, and larger than any memory, are fake ones: shapes and devices without data.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pgolf_kernels as pk
from pgolf_kernels import extension, tiles
from pgolf_kernels.ops.causal_attention import op as attention
from pgolf_kernels.ops.int6_linear import op as int6
from pgolf_kernels.ops.leaky_relu2_mlp import op as mlp
from pgolf_kernels.ops.newton_schulz import op as newton_schulz
from pgolf_kernels.ops.slot import op as slot
from pgolf_kernels.ops.softcapped_cross_entropy import op as cross_entropy


def full(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def mlp_arguments(rows=3, device="cpu", dtype=torch.float32):
    options = {"dtype": dtype, "device": device}
    return {"x": full(rows, 16, **options), "w_up": full(32, 16, **options), "w_down": full(16, 32, **options)}


def cross_entropy_arguments(tokens=3, device="cpu", dtype=torch.float32):
    options = {"dtype": dtype, "device": device}
    hidden, weight = full(tokens, 16, **options), full(32, 16, **options)
    return {"hidden": hidden, "weight": weight, "targets": full(tokens, dtype=torch.int64, device=device)}


def attention_arguments(tokens=3, device="cpu", dtype=torch.float32):
    return {name: full(1, tokens, 2, 16, dtype=dtype, device=device) for name in "qkv"}


def int6_arguments(rows=3, device="cpu", dtype=torch.float32):
    packed, scale = full(32, 12, dtype=torch.uint8, device=device), full(32, dtype=torch.float16, device=device)
    return {"x": full(rows, 16, dtype=dtype, device=device), "weight": pk.Int6Weight(packed, scale, (32, 16))}


def slot_arguments(windows=2, device="cpu", dtype=torch.float32):
    options = {"dtype": dtype, "device": device}
    hidden, weight = full(windows, 3, 16, **options), full(32, 16, **options)
    return {"hidden": hidden, "weight": weight, "targets": full(windows, 3, dtype=torch.int64, device=device)}


def fit_arguments(windows=2, device="cpu", dtype=torch.float32):
    more = {"fit_mask": full(windows, 3, device=device), "optimizer": pk.AdamW(), "steps": 1}
    return slot_arguments(windows, device, dtype) | more


def score_arguments(windows=2, device="cpu", dtype=torch.float32):
    return slot_arguments(windows, device, dtype) | {"fit": None, "rows": full(windows, 3, dtype=bool, device=device)}


def matrices(count=2, device="cpu", dtype=torch.float32):
    return {"g": full(count, 16, 32, dtype=dtype, device=device)}


def banks(count=2, device="cpu", dtype=torch.float32):
    return {"banks": [full(count, 16, 32, dtype=dtype, device=device), full(1, 16, 16, dtype=dtype, device=device)]}


# Op, arguments that it takes, how many make a kernel's numbers overflow, its implementations.
OPS = {
    "leaky_relu2_mlp": (mlp_arguments, 2**31, mlp.IMPLS),
    "newton_schulz": (matrices, 2**16, newton_schulz.IMPLS),
    "newton_schulz_banks": (banks, 2**16, newton_schulz.BANKS_IMPLS),
    "int6_linear": (int6_arguments, None, int6.IMPLS),
    "causal_attention": (attention_arguments, None, attention.IMPLS),
    "softcapped_cross_entropy": (cross_entropy_arguments, 2**31, cross_entropy.IMPLS),
    "slot_fit": (fit_arguments, 2**25, slot.FIT_IMPLS),
    "slot_score": (score_arguments, 2**25, slot.SCORE_IMPLS),
}
TENSORS = [(op, name) for op, (make, *_) in OPS.items() for name, t in make().items() if isinstance(t, torch.Tensor)]
NUMBERS = [
    ("leaky_relu2_mlp", "negative_slope"),
    ("newton_schulz", "eps"),
    ("newton_schulz_banks", "eps"),
    ("softcapped_cross_entropy", "softcap"),
    ("softcapped_cross_entropy", "ignore_index"),
]


@pytest.mark.parametrize("op", OPS)
def test_these_arguments_are_right(op):
    getattr(pk, op)(**OPS[op][0]())


@pytest.mark.parametrize("wrong", [[1.0, 2.0], None, 3], ids=["list", "None", "number"])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_tensor(op, name, wrong):
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be a tensor, got {type(wrong).__name__}"):
        getattr(pk, op)(**OPS[op][0]() | {name: wrong})


@pytest.mark.parametrize("wrong", [None, "30", [1.0]], ids=["None", "string", "list"])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_no_number(op, name, wrong):
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be a number, got {type(wrong).__name__}"):
        getattr(pk, op)(**OPS[op][0]() | {name: wrong})


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("newton_schulz_banks", {"banks": None}, "banks must be a list of tensors, got NoneType"),
        ("newton_schulz_banks", {"banks": [[1.0]]}, r"banks\[0\] must be a tensor, got list"),
        ("newton_schulz", {"coefficients": None}, "coefficients must be a name or a list of triples"),
        ("newton_schulz", {"steps": 2.0}, "steps must be an int >= 0, got 2.0"),
        ("newton_schulz", {"dtype": "bfloat16"}, "dtype must be floating point, got bfloat16"),
        ("int6_linear", {"bias": [1.0]}, "bias must be a tensor, got list"),
        ("int6_linear", {"weight": torch.zeros(2, 2)}, "weight must be an Int6Weight, got"),
        ("softcapped_cross_entropy", {"reduction": None}, "reduction must be 'mean', 'sum' or 'none', got None"),
        ("slot_fit", {"softcap": "30"}, "softcap must be a number, got str"),
        ("slot_fit", {"steps": None}, "steps must be an int >= 0, got None"),
        ("slot_fit", {"optimizer": None}, "optimizer must be an AdamW, .*, got NoneType"),
        ("slot_fit", {"optimizer": pk.AdamW(lr=None)}, "optimizer's lr must be a number, got NoneType"),
        ("slot_fit", {"optimizer": pk.AdamW(betas=None)}, r"betas must be two numbers in \[0, 1\), got None"),
        ("slot_fit", {"optimizer": pk.LBFGS(history="9")}, "optimizer's history must be a number, got str"),
        ("slot_fit", {"init": torch.zeros(2, 16)}, "init must be a SlotFit, or None, got Tensor"),
        ("slot_fit", {"num_rows": 3}, "num_rows must be None or 2 ints, got int"),
        ("slot_score", {"softcap": [30.0]}, "softcap must be a number, got list"),
        ("slot_score", {"fit": {"delta": None}}, "fit must be what slot_fit returned, or None, got dict"),
        ("quantize_int6", {"w": [[1.0]]}, "w must be a tensor, got list"),
        ("quantize_int6", {"w": torch.ones(2, 2), "clip": None}, "clip must be a number, got NoneType"),
        ("quantize_int6", {"w": torch.ones(2, 2), "floor": "0"}, "floor must be a number, got str"),
    ],
)
def test_other_arguments(op, changed, message):
    arguments = OPS[op][0]() if op in OPS else {}
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(pk, op)(**arguments | changed)


def test_int6_weights_are_made_of_tensors():
    with pytest.raises(ValueError, match="^Int6Weight: packed must be a tensor, got list"):
        pk.Int6Weight([1], torch.ones(1).half(), (1, 4))
    with pytest.raises(ValueError, match="^Int6Weight: scale must be a tensor, got NoneType"):
        pk.Int6Weight.from_codes(torch.ones(1, 4, dtype=torch.int8), None)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake tensors; the CUDA extension, where it is built, is told that it can run on them."""
    monkeypatch.setattr(tiles, "gpu", lambda device: tiles.HOPPER)
    if extension.cuda is not None:
        monkeypatch.setattr(extension, "why_not_cuda", lambda device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if op != "newton_schulz"])
def test_mixed_devices(fake_gpu, op, name):
    arguments = OPS[op][0](device="cuda")
    with pytest.raises(ValueError, match=rf"^{op}: .*(one device|must be on)"):
        getattr(pk, op)(**arguments | {name: OPS[op][0](device="cpu")[name]})


def reasons(op, make):
    """What each of an op's implementations says to these arguments."""
    return {choice.name: choice.reason for choice in pk.explain(op, **make)}


@pytest.mark.parametrize("op", [op for op, (_, most, _) in OPS.items() if most])
def test_more_than_the_kernels_can_number(fake_gpu, op):
    pytest.importorskip("triton")
    make, most, _ = OPS[op]
    few, many = (reasons(op, make(count, "cuda", torch.bfloat16)) for count in (2, most))
    own = [name for name in few if name in ("triton", "triton_megakernel", "cuda")]
    assert own
    for name in own:
        if name == "cuda" and extension.cuda is None:
            assert few[name] == many[name] == extension.WHY_NOT_CUDA
            continue
        assert few[name] is None
        assert re.search(r"the kernels number \w+ up to \d+, got \d{5}", many[name]), many[name]
    assert many["reference"] is None


@pytest.mark.parametrize("op", ["leaky_relu2_mlp", "newton_schulz", "softcapped_cross_entropy", "int6_linear"])
def test_strided_tensors_are_taken(fake_gpu, op):
    """The launchers copy them; the ops' own tests compute with some."""
    pytest.importorskip("triton")
    make = OPS[op][0](4, "cuda", torch.bfloat16)
    name = next(name for name, t in make.items() if isinstance(t, torch.Tensor))
    strides = [2 * stride for stride in make[name].stride()]
    strided = torch.empty_strided(make[name].shape, strides, dtype=torch.bfloat16, device="cuda")
    assert reasons(op, make | {name: strided})["triton"] is None
