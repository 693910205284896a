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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from triton.testing import do_bench

from pgolf_kernels import tiles
from pgolf_kernels.ops.int6_linear import gpu as int6_gpu
from pgolf_kernels.ops.int6_linear import quantize_int6
from pgolf_kernels.ops.int6_linear import triton_kernel as int6
from pgolf_kernels.ops.leaky_relu2_mlp import reference as mlp_reference
from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel as mlp
from pgolf_kernels.ops.softcapped_cross_entropy import op as ce_op
from pgolf_kernels.ops.softcapped_cross_entropy import reference as ce_reference
from pgolf_kernels.ops.softcapped_cross_entropy import softcapped_cross_entropy
from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel as ce

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


def _median_ms(call: Callable) -> float:
    return do_bench(call, warmup=20, rep=60, return_mode="median")


def _ranked(candidates: list, build: Callable, check: Callable) -> list[dict]:
    """The eight fastest candidates that are right, fastest first, then those that cannot run."""
    timed, failed = [], []
    for candidate in candidates:
        call = build(candidate)
        try:
            correct = check(call())
        except Exception as error:
            failed.append({"config": candidate, "failed": f"{type(error).__name__}: {error}"[:80]})
            continue
        if correct:
            timed.append({"config": candidate, "ms": round(_median_ms(call), 4)})
        else:
            failed.append({"config": candidate, "failed": "wrong result"})
    return sorted(timed, key=lambda row: row["ms"])[:8] + failed


def _close(want: torch.Tensor) -> Callable:
    return lambda got: bool((got.float() - want.float()).norm() <= 1e-2 * want.float().norm())


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
        result[f"up {H}"] = _ranked(tilings, lambda t, x=x, w=w_up: lambda: mlp.up(x, w, SLOPE, t), _close(want_a))
        result[f"dp {H}"] = _ranked(
            tilings, lambda t, dy=dy, w=w_down, a=a: lambda: mlp.dp(dy, w, a, SLOPE, t), _close(want_dp)
        )
        result[f"cublas {H}"] = {
            "x w_up^T": _median_ms(lambda x=x, w=w_up: x @ w.T),
            "dy w_down": _median_ms(lambda dy=dy, w=w_down: dy @ w),
            "a w_down^T": _median_ms(lambda a=a, w=w_down: a @ w.T),
            "dp w_up": _median_ms(lambda a=a, w=w_up: a @ w),
            "dp^T x": _median_ms(lambda a=a, x=x: a.T @ x),
            "eager mlp forward": _median_ms(
                lambda x=x, u=w_up, d=w_down: mlp_reference.forward(x, u, d, SLOPE),
            ),
        }
    return result


def tune_softcapped_cross_entropy() -> dict:
    """Warps of the row kernel, and keeping d(logits) against chunks of several sizes, per vocabulary size."""
    result = {}
    for V in VOCABULARIES:
        hidden, weight = _normal(T, D), _normal(V, D, scale=4 * D**-0.5)
        targets = torch.randint(V, (T,), device=DEVICE)
        losses, one = torch.empty(T, device=DEVICE), torch.full((), 1 / T, device=DEVICE)
        logits = hidden @ weight.T
        result[f"row kernel {V}"] = _ranked(
            [1, 2, 4, 8, 16],
            lambda warps, u=logits, y=targets, losses=losses, one=one: (
                lambda: ce.loss_and_grad(u, y, losses, one, SOFTCAP, IGNORE, num_warps=warps)
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
            return all(_close(w)(g) for g, w in zip(got, want, strict=True))

        result[f"rows per chunk {V}"] = _ranked(chunks, with_chunk, check)
        result[f"cublas {V}"] = {
            "hidden weight^T": _median_ms(lambda h=hidden, w=weight: h @ w.T),
            "dlogits weight": _median_ms(lambda u=logits, w=weight: u @ w),
            "dlogits^T hidden": _median_ms(lambda u=logits, h=hidden: u.T @ h),
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
            result[f"{name} {M}"] = _ranked(
                _int6_tiles(M),
                lambda t, x=x, w=weight: lambda: int6.forward(x, w.packed, w.scale, None, t),
                _close(x @ weight.dequantize(x.dtype).T),
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
        ways[M] = {way: round(_median_ms(calls[way]), 5) for way in able}
    return result | {"borders 0": [{"config": borders(ways), "ms": 0.0, "measured": ways}]}


def borders(ways: dict[int, dict[str, float]]) -> int6_gpu.Borders:
    """Up to how many rows each way wins, from the times of {rows: {way: ms}}; 0: nowhere from one row on."""
    fastest = [(rows, min(times, key=times.get)) for rows, times in sorted(ways.items())]
    cuda = [rows for rows, _ in itertools.takewhile(lambda item: item[1] == "cuda", fastest)]
    small = [rows for rows, _ in itertools.takewhile(lambda item: item[1] != "dequantize", fastest)]
    return int6_gpu.Borders(cuda=max(cuda, default=0), triton=max(small, default=0))


TUNERS = {
    "leaky_relu2_mlp": tune_leaky_relu2_mlp,
    "softcapped_cross_entropy": tune_softcapped_cross_entropy,
    "int6_linear": tune_int6_linear,
}


# What a result is called, and the rows of a table it becomes: op, kernel, name of the size's bound, other bounds.
_TABLE = {
    "up": ("leaky_relu2_mlp", "up", "max_hidden", {}),
    "dp": ("leaky_relu2_mlp", "dp", "max_hidden", {}),
    "row kernel": ("softcapped_cross_entropy", "row", "max_block", {}),
    # Depths of other divisors have tails, and keep the shipped rows.
    "linear": ("int6_linear", "linear", "max_rows", {"max_programs": 127, "min_divisor": 256}),
    "wide linear": ("int6_linear", "linear", "max_rows", {"min_programs": 128, "min_divisor": 256}),
    "borders": ("int6_linear", "borders", "max_size", {}),
}


def add_to_table(table: dict, what: str, rows: list[dict]) -> None:
    """Enter the fastest candidate of "up 1536", say; results come in the order of their sizes."""
    name, _, size = what.rpartition(" ")
    if name not in _TABLE or "ms" not in rows[0]:
        return
    op, kernel, bound, others = _TABLE[name]
    best = rows[0]["config"]
    fields = best._asdict() if hasattr(best, "_asdict") else {"num_warps": best}
    table.setdefault(op, {}).setdefault(kernel, []).append({bound: int(size)} | others | fields)


def close_table(table: dict) -> None:
    """The row of the largest size measured serves all beyond it, too: among those with the same other bounds."""
    sizes = {(op, kernel): bound for op, kernel, bound, _ in _TABLE.values()}
    for op, kernels in table.items():
        for kernel, entries in kernels.items():
            last = {}
            for entry in entries:
                others = {key: value for key, value in entry.items() if key[:4] in ("min_", "max_")}
                others.pop(sizes[op, kernel], None)
                last[tuple(others.items())] = entry
            for entry in last.values():
                entry.pop(sizes[op, kernel], None)


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
