"""Search the tiles of the Triton kernels on this GPU: `python -m benchmarks.tune [OP ...]` prints JSON, fastest first.

Nothing runs this by itself: kernels ship with tables (pgolf_kernels/tiles), because compiling candidates costs minutes
of a timed job. --write makes the fastest ones this machine's own table, which then comes before the shipped ones.
Candidates compile in parallel processes first (Triton's cache on disk hands them over), then each result is checked
against PyTorch and timed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.tuning import add_to_table, close, close_table, median_ms, ranked, with_tile_of
from pgolf_kernels import multi_tensor, tiles
from pgolf_kernels.ops.int6_linear import gpu as int6_gpu
from pgolf_kernels.ops.int6_linear import quantize_int6
from pgolf_kernels.ops.int6_linear import triton_kernel as int6
from pgolf_kernels.ops.leaky_relu2_mlp import reference as mlp_reference
from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel as mlp
from pgolf_kernels.ops.slot import AdamW, slot_fit
from pgolf_kernels.ops.slot import triton_rows as slot_rows
from pgolf_kernels.ops.softcapped_cross_entropy import op as ce_op
from pgolf_kernels.ops.softcapped_cross_entropy import reference as ce_reference
from pgolf_kernels.ops.softcapped_cross_entropy import softcapped_cross_entropy
from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel as ce
from pgolf_kernels.optim import adamw_pass, muon_passes
from pgolf_kernels.optim.averages import Averages

DEVICE, T, D = "cuda", 98304, 512
VOCABULARIES = (1024, 4096, 8192)
SOFTCAP, IGNORE, SLOPE = 30.0, -100, 0.5
TILES = [  # block m, n, k, warps, stages, split epilogue, most programs that fit a multiprocessor of Hopper
    (128, 256, 64, 8, 3, True, 1),
    (128, 256, 64, 8, 4, True, 1),
    (128, 256, 64, 8, 3, False, 1),
    (256, 128, 64, 8, 3, True, 1),
    (128, 128, 64, 4, 3, True, 2),
    (128, 128, 64, 8, 3, True, 2),
    (128, 128, 64, 8, 4, False, 1),
    (64, 256, 64, 4, 2, True, 2),
]


def _tilings() -> list[mlp.Tiling]:
    """Every tile as a plain grid, as a persistent one, and persistent with its loops flattened."""
    persistent = [(0, False), (1, False), (1, True)]
    return [
        mlp.Tiling(*tile, programs * most, flatten)
        for (*tile, most), (programs, flatten) in itertools.product(TILES, persistent)
    ]


def _normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).bfloat16()


def _mlp_inputs(M: int, H: int) -> tuple[torch.Tensor, ...]:
    return _normal(M, D), _normal(H, D, scale=D**-0.5), _normal(D, H, scale=H**-0.5), _normal(M, D)


def _compile_mlp(tiling: mlp.Tiling) -> None:
    """Fill Triton's disk cache; 1024 rows specialise like any multiple of 16."""
    x, w_up, w_down, dy = _mlp_inputs(1024, 1536)
    try:
        mlp.dp(dy, w_down, mlp.up(x, w_up, SLOPE, tiling), SLOPE, tiling)
    except Exception as error:  # too much shared memory, say: the search below meets it again and skips the candidate
        print(f"{tuple(tiling)}: {error}", file=sys.stderr)


def tune_leaky_relu2_mlp() -> dict:
    """Both kernels at both widths, with cuBLAS's time for the bare product and PyTorch's for product and epilogue."""
    tilings = _tilings()
    with ProcessPoolExecutor(min(12, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_mlp, tilings))
    result = {}
    for H in (1536, 2048):
        x, w_up, w_down, dy = _mlp_inputs(T, H)
        a = mlp.up(x, w_up, SLOPE)
        p = x @ w_up.T
        want_a = torch.nn.functional.leaky_relu(p, SLOPE).square()
        want_dp = (dy @ w_down) * torch.where(p > 0, 2 * p, 2 * SLOPE**2 * p)
        result[f"up {H}"] = ranked(tilings, lambda t, x=x, w=w_up: lambda: mlp.up(x, w, SLOPE, t), close(want_a))
        result[f"dp {H}"] = ranked(
            tilings, lambda t, dy=dy, w=w_down, a=a: lambda: mlp.dp(dy, w, a, SLOPE, t), close(want_dp)
        )
        result[f"cublas {H}"] = {
            "x w_up^T": median_ms(lambda x=x, w=w_up: x @ w.T),
            "dy w_down": median_ms(lambda dy=dy, w=w_down: dy @ w),
            "a w_down^T": median_ms(lambda a=a, w=w_down: a @ w.T),
            "dp w_up": median_ms(lambda a=a, w=w_up: a @ w),
            "dp^T x": median_ms(lambda a=a, x=x: a.T @ x),
            "eager mlp forward": median_ms(
                lambda x=x, u=w_up, d=w_down: mlp_reference.forward(x, u, d, SLOPE),
            ),
        }
    return result


def tune_softcapped_cross_entropy() -> dict:
    """Blocks and warps of the row kernel, and keeping d(logits) against chunks of several sizes, per vocabulary."""
    result = {}
    for V in VOCABULARIES:
        hidden, weight = _normal(T, D), _normal(V, D, scale=4 * D**-0.5)
        targets = torch.randint(V, (T,), device=DEVICE)
        losses, one = torch.empty(T, device=DEVICE), torch.full((), 1 / T, device=DEVICE)
        logits = hidden @ weight.T
        result[f"row kernel {V}"] = ranked(
            [ce.RowTile(block, warps) for block in (V, V // 2) for warps in (1, 2, 4, 8, 16)],
            lambda tile, u=logits, y=targets, losses=losses, one=one: (
                lambda: ce.loss_and_grad(u, y, losses, one, SOFTCAP, IGNORE, tile)
            ),
            lambda _: True,  # it overwrites its input, so only its time means something here
        )
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        want = torch.autograd.grad(ce_reference.forward(*leaves, targets, SOFTCAP, IGNORE, "mean"), leaves)

        def train(leaves=leaves, targets=targets):
            return torch.autograd.grad(softcapped_cross_entropy(*leaves, targets, impl="triton"), leaves)

        def with_chunk(rows, V=V, train=train):
            def call():
                ce_op.KEPT_LOGITS, ce_op.CHUNK_LOGITS = (2**40, 0) if rows is None else (0, rows * V)
                return train()

            return call

        chunks = [None, 2048, 4096, 8192, 16384, 32768]

        def check(got, want=want):
            return all(close(w)(g) for g, w in zip(got, want, strict=True))

        result[f"rows per chunk {V}"] = ranked(chunks, with_chunk, check)
        result[f"cublas {V}"] = {
            "hidden weight^T": median_ms(lambda h=hidden, w=weight: h @ w.T),
            "dlogits weight": median_ms(lambda u=logits, w=weight: u @ w),
            "dlogits^T hidden": median_ms(lambda u=logits, h=hidden: u.T @ h),
        }
    return result


def _int6_tiles(M: int) -> list[int6.Tile]:
    block_m = next((size for size in (16, 32) if size >= M), 64)
    registers = 128 if block_m == 64 else 168  # told nothing, ptxas spills to fit one block more
    sizes = itertools.product((16, 32, 64), (32, 64), (4, 8), (2, 3, 4))
    return [int6.Tile(block_m, *size, registers) for size in sizes]


def tune_int6_linear() -> dict:
    """Tiles for narrow and wide weights at each number of rows; then all three ways, for the borders among them.

    do_bench empties the cache before each call, so weights come from memory, as in a model with many layers.
    """
    result, ways = {}, {}
    weights = {"linear": quantize_int6(_normal(1536, 512)), "wide linear": quantize_int6(_normal(8192, 512))}
    for name, weight in weights.items():
        for M in (16, 32, 64):
            x = _normal(M, 512)
            result[f"{name} {M}"] = ranked(
                _int6_tiles(M),
                lambda t, x=x, w=weight: lambda: int6.forward(x, w.packed, w.scale, None, t),
                close(x @ weight.dequantize(x.dtype).T),
            )
    weight = weights["linear"]
    for M in (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256):
        x = _normal(M, 512)
        best = next((size for size in (16, 32, 64) if size >= M), 64)
        tile = result[f"linear {best}"][0]["config"]
        calls = {
            "cuda": lambda x=x: int6_gpu.forward(x, weight.packed, weight.scale, None),
            "triton": lambda x=x, t=tile: int6.forward(x, weight.packed, weight.scale, None, t),
            "dequantize": lambda x=x: x @ int6.dequantize(weight.packed, weight.scale, 512, x.dtype).T,
        }
        able = [
            way for way in calls if way != "cuda" or not int6_gpu.why_not_cuda(x, weight.packed, weight.scale, None)
        ]
        ways[M] = {way: round(median_ms(calls[way]), 5) for way in able}
    return result | {"borders 0": [{"config": borders(ways), "ms": 0.0, "measured": ways}]}


def borders(ways: dict[int, dict[str, float]]) -> int6_gpu.Borders:
    """Up to how many rows each way wins, from the times of {rows: {way: ms}}; 0: nowhere from one row on."""
    fastest = [(rows, min(times, key=times.get)) for rows, times in sorted(ways.items())]
    cuda = [rows for rows, _ in itertools.takewhile(lambda item: item[1] == "cuda", fastest)]
    small = [rows for rows, _ in itertools.takewhile(lambda item: item[1] != "dequantize", fastest)]
    return int6_gpu.Borders(cuda=max(cuda, default=0), triton=max(small, default=0))


SLOT_TILES = {
    "sweep": [slot_rows.SweepTile(*t) for t in itertools.product((1024, 2048, 4096, 8192), (64, 128), (4, 8, 16))],
    "project": [slot_rows.WeightTile(*t) for t in itertools.product((8, 16, 32), (64, 128, 256), (2, 4, 8))],
    "reduce": [slot_rows.RowsTile(*t) for t in itertools.product((64, 128, 256), (1, 2, 4))],
    "add_rows": [slot_rows.DepthTile(*t) for t in itertools.product((64, 128, 256), (2, 4, 8))],
    "descend": [slot_rows.WeightTile(*t) for t in itertools.product((16, 32, 64), (32, 64, 128), (2, 4, 8))],
}


def tune_slot() -> dict:
    """Each kernel of a step, by the time of whole fits through the norm; the sweep at two sizes of the vocabulary."""
    result = {}
    for V in (4096, 8192):
        hidden, weight = _normal(8, 2048, D), _normal(V, D, scale=D**-0.5)
        targets, mask = torch.randint(V, (8, 2048), device=DEVICE), torch.ones(8, 2048, device=DEVICE)
        options = {"norm": "before", "parameters": "both", "optimizer": AdamW(lr=0.01), "steps": 4, "impl": "triton"}

        def fit(tensors=(hidden, weight, targets, mask), options=options):
            found = slot_fit(*tensors, num_rows=[2048] * 8, **options)
            return torch.cat([found.delta, found.bias], 1)

        want = fit()
        for kernel, candidates in SLOT_TILES.items():
            if kernel == "sweep" or V == 4096:
                result[f"slot {kernel} {V}"] = ranked(candidates, with_tile_of("slot", kernel, fit), close(want))
    return result


def tune_optim() -> dict:
    """The passes over 22 matrices of 512 x 1536. With lr and momentum 0 they change nothing but read and write all."""
    params = [[torch.randn(22, 512, 1536, device=DEVICE)]]
    (p,), grads = params[0], [[_normal(22, 512, 1536)]]
    buffers, averages = [[torch.zeros_like(p)]], Averages("tune", [p], {p: p.clone()}, 0.99)
    moments = [[torch.zeros_like(p)], [torch.zeros_like(p)]]
    before, steps = p.clone(), [torch.ones((), device=DEVICE)]

    def momentum():
        return muon_passes.momentum_banks(grads, buffers, 0.0, True, torch.bfloat16)[0]

    def update():
        muon_passes.update_banks(params, grads[0], [1.0], 0.0, 0.0, averages)
        return p

    def adamw():
        passed = ([p], [before], *moments, steps, [averages.of[p]])
        adamw_pass.adamw_pass(*passed, 0.0, (0.9, 0.95), 1e-8, 0.0, 0.99)
        return p

    candidates = [multi_tensor.PassTile(*t) for t in itertools.product((1024, 2048, 4096, 8192), (4, 8))]
    passes = {"momentum": (momentum, grads[0][0]), "update": (update, before), "adamw": (adamw, before)}
    return {
        f"optim {name} 0": ranked(candidates, with_tile_of("optim", name, call), close(want))
        for name, (call, want) in passes.items()
    }


TUNERS = {
    "leaky_relu2_mlp": tune_leaky_relu2_mlp,
    "softcapped_cross_entropy": tune_softcapped_cross_entropy,
    "int6_linear": tune_int6_linear,
    "slot": tune_slot,
    "optim": tune_optim,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"one of {list(TUNERS)}; all by default")
    parser.add_argument("--write", action="store_true", help="keep the fastest ones as this machine's own table")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(TUNERS):
        parser.error(f"nothing to tune for {sorted(unknown)}; expected {list(TUNERS)}")
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU")
    found = {}
    for op in options.ops or TUNERS:
        for what, rows in TUNERS[op]().items():
            print(json.dumps({"op": op, "what": what, "gpu": torch.cuda.get_device_name(), "result": rows}), flush=True)
            add_to_table(found, what, rows)
    if options.write:
        close_table(found)
        path = tiles.own_file(tiles.gpu(torch.device(DEVICE, 0)))
        tiles.write(path, (tiles.read(path) if path.exists() else {}) | found)
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
