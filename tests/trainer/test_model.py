"""The model against arrays computed by the published code: logits, loss and gradients of three systems, tables, hashes.

The arrays were made in float32 with random weights, so that no part of the model is silent. Gradients of matrices are
stored as their product with a fixed vector, which moves if any row of them does.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICES

from pgolf.config import Config
from pgolf.model import GPT, bigram_index, rotary_table

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = Config(
    vocab_size=128,
    model_dim=48,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=8,
    train_seq_len=32,
    train_batch_tokens=64,
    ve_dim=20,
)
SYSTEMS = {
    "pr1217": SMALL.replace(
        num_layers=5, xsa_last_n=3, bigram_vocab_size=96, bigram_dim=20, skip_gates=True, ve_layers=(3, 4)
    ),
    "pr675": SMALL.replace(
        num_layers=5,
        xsa_last_n=5,
        bigram_vocab_size=96,
        bigram_dim=20,
        ve_layers=(3, 4),
        value_residual=True,
    ),
    "pr1333_recurrence_parallel": SMALL.replace(
        num_layers=6,
        mlp_mult=4.0,
        xsa_last_n=6,
        smear_gate=False,
        skip_gates=True,
        ve_layers=(4, 5),
        recur_layers=(2, 3),
        parallel_start_layer=4,
    ),
}
SYSTEMS["pr1333_no_recurrence_parallel"] = SYSTEMS["pr1333_recurrence_parallel"].replace(recur_layers=())
SYSTEMS["pr1333_recurrence_no_parallel"] = SYSTEMS["pr1333_recurrence_parallel"].replace(parallel_start_layer=0)


def load(name: str) -> dict[str, np.ndarray]:
    arrays = dict(np.load(GOLDEN / f"forward_{name}.npz"))
    if name.startswith("pr1333_") and name != "pr1333_recurrence_parallel":  # these share its weights and inputs
        shared = np.load(GOLDEN / "forward_pr1333_recurrence_parallel.npz")
        arrays |= {k: shared[k] for k in shared.files if k[:2] == "w:" or k in ("input_ids", "target_ids")}
    return arrays


def build(name: str, arrays: dict[str, np.ndarray], device: str, dtype: torch.dtype) -> GPT:
    model = GPT(SYSTEMS[name])
    weights = {k[2:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w:")}
    if "qo_bank" in weights:
        model.load_state_dict(weights)
    else:
        if not SYSTEMS[name].parallel_start_layer:
            weights.pop("lane_merge", None)
        model.load_export(weights)
    model.activation_dtype = dtype
    return model.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_logits_loss_and_gradients_are_the_published_ones(name, device):
    arrays = load(name)
    model = build(name, arrays, device, torch.float64)
    ids, targets = (torch.from_numpy(arrays[k]).long().to(device) for k in ("input_ids", "target_ids"))
    # float64 here, so what remains is the rounding of the float32 arrays: 4e-6 on logits, 1e-6 on gradients.
    logits = model.logits(ids).detach().cpu().numpy()
    np.testing.assert_allclose(logits, arrays["logits"], atol=4e-5)

    loss = model(ids, targets)
    loss.backward()
    np.testing.assert_allclose(loss.item(), arrays["loss"], rtol=2e-6)
    gradients = {k: p.grad for k, p in model.named_parameters()}
    banked = GPT(SYSTEMS[name])
    with torch.no_grad():
        for k, p in banked.named_parameters():
            p.copy_(gradients[k])
    published = gradients if "w:qo_bank" in arrays else banked.export_state()
    checked = 0
    for key, want in arrays.items():
        kind, _, parameter = key.partition(":")
        if kind == "g" or kind == "p":
            got = published[parameter].detach().double().cpu().numpy()
            largest = np.abs(want).max() if kind == "g" else arrays["m:" + parameter]
            if kind == "p":
                got = got @ np.random.default_rng(0).standard_normal(got.shape[-1])
            np.testing.assert_allclose(got, want, atol=4e-6 + 1e-4 * largest, err_msg=parameter)
            checked += 1
    assert checked >= 20


def test_parameter_counts_of_the_published_systems():
    banks = Config(num_layers=11, model_dim=512, ve_dim=128, ve_layers=(9, 10))
    pr1217 = banks.replace(bigram_vocab_size=2816, bigram_dim=112, skip_gates=True)
    pr1128 = banks.replace(bigram_vocab_size=1536)
    pr1333 = banks.replace(
        vocab_size=4096, mlp_mult=4.0, smear_gate=False, skip_gates=True, recur_layers=(4, 5), parallel_start_layer=7
    )
    pr675 = banks.replace(bigram_vocab_size=1024, value_residual=True)
    counts = [GPT.count_parameters(cfg) for cfg in (pr1217, pr1128, pr1333, pr675)]
    assert counts == [27_041_372, 26_928_220, 34_401_372, 26_862_694]


def test_untrained_model_predicts_the_uniform_distribution():
    torch.manual_seed(0)
    cfg = SYSTEMS["pr1217"].replace(vocab_size=1024)
    ids, targets = torch.randint(0, 1024, (2, 2, 256))
    assert abs(GPT(cfg)(ids, targets).item() - np.log(1024)) < 0.01


def test_rotary_tables_are_the_published_ones():
    golden = np.load(GOLDEN / "rope_and_hash.npz")
    cases = {
        "r0": (16, 256, 1024),
        "r1": (16, 2048, 1024),
        "r2": (8, 1500, 1024),
        "r3": (16, 2048, 2048),
        "r4": (4, 96, 64),
    }
    for name, (dims, tokens, train_len) in cases.items():
        cfg = Config(rope_dims=dims, rope_train_len=train_len)
        positions = golden[f"{name}_positions"]
        for table, kind in zip(rotary_table(cfg, tokens, torch.device("cpu")), ("cos", "sin"), strict=True):
            want = golden[f"{name}_{kind}"]
            assert want.shape[1] == dims // 2
            np.testing.assert_allclose(table.numpy()[positions], want, atol=2e-4)


def test_bigram_hash_is_the_published_one():
    golden = np.load(GOLDEN / "rope_and_hash.npz")
    ids = torch.from_numpy(golden["hash_tokens"]).long()
    for buckets in (64, 2816, 3072):
        assert (bigram_index(ids, buckets).numpy() == golden[f"bigram_hash_{buckets}"]).all()


def test_exclusive_attention_leaves_nothing_along_the_own_value():
    cfg = SYSTEMS["pr1217"]
    assert [GPT(cfg).blocks[i].attn.exclude_self for i in range(5)] == [False, False, True, True, True]


def test_export_and_load_are_inverse():
    torch.manual_seed(1)
    model, other = GPT(SYSTEMS["pr675"]), GPT(SYSTEMS["pr675"])
    other.load_export(model.export_state())
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_no_position_sees_a_later_token():
    """Change one input: hidden states before it must keep their bits, whatever parts of the model are on."""
    for name in SYSTEMS:
        model = build(name, load(name), "cpu", torch.float32)
        ids = torch.randint(0, 128, (1, 32))
        changed = ids.clone()
        changed[0, 20] = (changed[0, 20] + 1) % 128
        before, after = model.hidden(ids), model.hidden(changed)
        assert torch.equal(before[:, :20], after[:, :20]), name
        assert not torch.equal(before[:, 20], after[:, 20]), name
