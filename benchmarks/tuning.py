"""What benchmarks.tune is made of: how candidates are timed, and how the fastest become a table of tiles."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from triton.testing import do_bench

from pgolf_kernels import tiles


def median_ms(call: Callable) -> float:
    return do_bench(call, warmup=20, rep=60, return_mode="median")


def ranked(candidates: list, build: Callable, check: Callable) -> list[dict]:
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
            timed.append({"config": candidate, "ms": round(median_ms(call), 4)})
        else:
            failed.append({"config": candidate, "failed": "wrong result"})
    return sorted(timed, key=lambda row: row["ms"])[:8] + failed


def close(want: torch.Tensor) -> Callable:
    return lambda got: bool((got.float() - want.float()).norm() <= 1e-2 * want.float().norm())


@contextlib.contextmanager
def taking(op: str, kernel: str, tile: tuple) -> Iterator[None]:
    """Within it every launch of a kernel takes `tile`, whatever the tables say."""
    choose = tiles.tile

    def chosen(on, of, name, kind, **facts):
        return tile if (of, name) == (op, kernel) else choose(on, of, name, kind, **facts)

    tiles.tile = chosen
    try:
        yield
    finally:
        tiles.tile = choose


def with_tile_of(op: str, kernel: str, call: Callable) -> Callable:
    """What ranked builds its calls with, where a kernel's launcher has no argument for its tile."""

    def build(tile: tuple) -> Callable:
        def with_tile():
            with taking(op, kernel, tile):
                return call()

        return with_tile

    return build


# What a result is called, and the rows of a table it becomes: op, kernel, name of the size's bound, other bounds.
_TABLE = {
    "up": ("leaky_relu2_mlp", "up", "max_hidden", {}),
    "dp": ("leaky_relu2_mlp", "dp", "max_hidden", {}),
    "row kernel": ("softcapped_cross_entropy", "row", "max_columns", {}),
    # Depths of other divisors have tails, and keep the shipped rows.
    "linear": ("int6_linear", "linear", "max_rows", {"max_programs": 127, "min_divisor": 256}),
    "wide linear": ("int6_linear", "linear", "max_rows", {"min_programs": 128, "min_divisor": 256}),
    "borders": ("int6_linear", "borders", "max_size", {}),
    # Kernels with one row for all sizes have one size here, whose bound falls away in close_table.
    **{
        f"slot {kernel}": ("slot", kernel, "max_columns", {})
        for kernel in ("sweep", "project", "reduce", "add_rows", "descend")
    },
    **{f"optim {kernel}": ("optim", kernel, "max_size", {}) for kernel in ("momentum", "update", "adamw")},
}


def add_to_table(table: dict, what: str, rows: list[dict]) -> None:
    """Enter the fastest candidate of "up 1536", say; results come in the order of their sizes."""
    name, _, size = what.rpartition(" ")
    if name not in _TABLE or "ms" not in rows[0]:
        return
    op, kernel, bound, others = _TABLE[name]
    fields = rows[0]["config"]._asdict()
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
