"""Whole steps, with our kernels against the same step with every op's reference: `python -m benchmarks.bench step`.

    train   forward, backward, clipping, Muon and AdamW on one batch of windows, as the trainer's run_step
    slot    a batch of sliding windows through the evaluator's per-window SLOT: hidden states, fit and scores

Models are fresh and tokens random, which changes nothing in what a step costs. Learning rates are 0, so every call does
the same work on the same weights, and the gate can compare the gradients with float64's.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench import Case
from pgolf.config import Config
from pgolf.model import GPT, activation_dtype
from pgolf.optimise.gradients import GradientBuffer
from pgolf.optimise.groups import Optimisers
from pgolf.presets import PRESETS
from pgolf.scoring.gate import TokenGate
from pgolf.scoring.slot import Slot
from pgolf.scoring.windows import make_windows
from pgolf_kernels import dispatch

SEQ_LEN, STRIDE = 512, 64
EXACT_WINDOWS = 8


def _config(num_layers: int, model_dim: int, num_tokens: int, **others) -> Config:
    """A GPT of the Parameter Golf family: grouped queries, 3 x wide MLP and a vocabulary of 1024 unless said."""
    heads = model_dim // 64
    shape = {"num_layers": num_layers, "model_dim": model_dim, "num_heads": heads, "num_kv_heads": heads // 2}
    return Config(**shape, **{"train_seq_len": SEQ_LEN, "train_batch_tokens": num_tokens} | others)


def _model(cfg: Config, device: str) -> GPT:
    """As after some training: projections back into the stream start at zero, and so do gradients behind them."""
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad():
        for bank in (model.qo_bank, model.mlp_down_bank):
            bank.copy_(torch.randn_like(bank) / bank.shape[-1] ** 0.5)
    model = model.to(device)
    model.activation_dtype = activation_dtype(cfg, torch.device(device))
    return model


class TrainStep:
    """One training step; returns the loss and the gradient of all parameters."""

    def __init__(self, model: GPT, compiled: bool = False):
        self.model = model
        self.gradients = GradientBuffer(self.model)
        self.optimisers = Optimisers(self.model, model.cfg, model.activation_dtype)
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients.zero()
        loss = self.forward(x, y, "mean")
        loss.backward()
        self.gradients.clip(1.0)
        self.optimisers.step(0.0, 0.95)
        return loss.detach(), self.gradients.flat.clone()


def _exact_step(model: GPT, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In micro-batches: the activations of a whole step in float64 are more than a GPU holds."""
    model = copy.deepcopy(model).double()
    model.activation_dtype = torch.float64
    parameters = list(model.parameters())
    loss, gradient = 0.0, 0.0
    for ids, targets in zip(x.split(EXACT_WINDOWS), y.split(EXACT_WINDOWS), strict=True):
        with dispatch.forced("reference"):
            part = model(ids, targets, "mean") * (len(ids) / len(x))
        gradient += torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters)])
        loss += part.detach()
    return loss, gradient * (1 / (gradient.norm() + 1e-6)).clamp(max=1.0)


def _reference(call, *inputs):
    with dispatch.forced("reference"):
        return call(*inputs)


def _train_case(cfg: Config, device: str, quick: bool) -> Case:
    model = _model(cfg, device)
    peers = {"reference ops": partial(_reference, TrainStep(copy.deepcopy(model)))}
    if not quick:
        peers["reference ops, torch.compile"] = partial(_reference, TrainStep(copy.deepcopy(model), compiled=True))
    windows, T = cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len
    num_parameters = sum(p.numel() for p in model.parameters())
    banks = [getattr(model, name).shape for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")]
    orthogonalise = sum(5 * b * (3 * min(m, n) ** 2 * max(m, n) + min(m, n) ** 3) for b, m, n in banks)
    attend = 6 * cfg.num_layers * cfg.train_batch_tokens * T * cfg.model_dim  # half of T x T, both products, 3 x
    published = f" V{cfg.vocab_size}" if T != SEQ_LEN else ""
    return Case(
        shape=f"train {cfg.num_layers}x{cfg.model_dim} {cfg.train_batch_tokens} tokens{published}",
        dtype=model.activation_dtype,
        inputs=lambda: tuple(torch.randint(cfg.vocab_size, (windows, T), device=device) for _ in range(2)),
        ours={"auto": TrainStep(copy.deepcopy(model))},
        peers=peers,
        exact=partial(_exact_step, model),
        flops=6 * num_parameters * cfg.train_batch_tokens + orthogonalise + attend,
        bytes=16 * num_parameters,  # weights, gradients, momentum: read, and the weights written
    )


def _slot_scores(model: GPT, scorer: Slot, windows: list, stream: Tensor) -> Tensor:
    gate = TokenGate(stream, model.tok_emb.weight.device)
    with torch.no_grad():
        batch = gate.open(windows, SEQ_LEN)
        return gate.score(batch, scorer(model, batch))


def _slot_case(cfg: Config, device: str, num_windows: int) -> Case:
    model = _model(cfg, device).requires_grad_(False)
    exact = copy.deepcopy(model).double()
    exact.activation_dtype = torch.float64
    adam = {"slot_beta1": 0.9, "slot_beta2": 0.999, "slot_eps": 1e-5}
    scorer = Slot(cfg.replace(slot_parameters="bias", slot_steps=8, slot_lr=0.06, slot_half_life=128.0, **adam))
    windows = make_windows(SEQ_LEN + (num_windows - 1) * STRIDE, SEQ_LEN, STRIDE)
    run = partial(_slot_scores, model, scorer, windows)

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randint(cfg.vocab_size, (SEQ_LEN + (num_windows - 1) * STRIDE + 1,)),)

    return Case(
        shape=f"slot {cfg.num_layers}x{cfg.model_dim} {num_windows} windows of {SEQ_LEN}",
        dtype=model.activation_dtype,
        inputs=inputs,
        ours={"auto": run},
        peers={"reference ops": partial(_reference, run)},
        exact=partial(_reference, partial(_slot_scores, exact, scorer, windows)),
        flops=2 * sum(p.numel() for p in model.parameters()) * num_windows * SEQ_LEN,
        bytes=2 * sum(p.numel() for p in model.parameters()),
    )


def cases(device: str, quick: bool):
    """Training at a small and at the published size, evaluation at the demo's. --quick takes a tiny model."""
    if quick:
        yield _train_case(_config(2, 128, 1024), device, quick)
        yield _slot_case(_config(2, 128, 1024), device, 2)
        return
    if device == "cuda":  # a rank's share of the published steps: #1217, #1128 and #675, then #1333
        share = {"num_tokens": 98304, "train_seq_len": 2048, "xsa_last_n": 11}
        yield _train_case(_config(11, 512, **share), device, quick)
        yield _train_case(_config(11, 512, **share, vocab_size=4096, mlp_mult=4.0), device, quick)
        yield _slot_case(PRESETS["demo"], device, 128)
        return
    yield _train_case(_config(6, 256, 4096), device, quick)
    yield _train_case(_config(11, 512, 4096), device, quick)
    yield _slot_case(PRESETS["demo"], device, 16)
