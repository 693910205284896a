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


TUNERS = {"leaky_relu2_mlp": tune_leaky_relu2_mlp, "softcapped_cross_entropy": tune_softcapped_cross_entropy}


# What a result is called, and the rows of a table it becomes: op, kernel, name of the bound.
_TABLE = {
    "up": ("leaky_relu2_mlp", "up", "max_hidden"),
    "dp": ("leaky_relu2_mlp", "dp", "max_hidden"),
    "row kernel": ("softcapped_cross_entropy", "row", "max_block"),
}


def add_to_table(table: dict, what: str, rows: list[dict]) -> None:
    """Enter the fastest candidate of "up 1536", say; results come in the order of their sizes."""
    name, _, size = what.rpartition(" ")
    if name not in _TABLE or "ms" not in rows[0]:
        return
    op, kernel, bound = _TABLE[name]
    best = rows[0]["config"]
    fields = best._asdict() if hasattr(best, "_asdict") else {"num_warps": best}
    entries = table.setdefault(op, {}).setdefault(kernel, [])
    entries[:] = [entry for entry in entries if bound in entry] + [{bound: int(size)} | fields]


def close_table(table: dict) -> None:
    """The row of the largest size measured serves all beyond it, too."""
    for kernels in table.values():
        for entries in kernels.values():
            last = {key: value for key, value in entries[-1].items() if not key.startswith("max_")}
            entries[-1] = last


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
