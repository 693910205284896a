"""docs/gpus.md, the table of what has run on which GPU, says what the rows and the page of machine code say."""

import re
from pathlib import Path

import pytest

from benchmarks.table import newest_rows

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MACHINES = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "RTX 5090": "sm_120"}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text, first):
    """Rows of the table whose header starts with `first`, as {column: cell}."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]


SUPPORT = table((ROOT / "docs/gpus.md").read_text(), "op")
PAGE = (ROOT / "docs/machine-code.md").read_text()
# Kernel -> the architectures that there is machine code for; CUDA C++ with <> for its template's arguments.
COMPILED = {row["Triton"].strip("`"): {sm for sm in row if row[sm] and sm != "Triton"} for row in table(PAGE, "Triton")}
for _row in table(PAGE, "CUDA C++"):
    _kernel = re.sub(r"<.*>|$", "<>", _row["CUDA C++"].strip("`"), count=1)
    COMPILED[_kernel] = {sm for sm in _row if _row[sm] and sm != "CUDA C++"}


def kernels(row):
    return re.findall(r"`(\w+(?:<>)?)`", row["kernels"])


def rows_of(row):
    """The measured rows that a row of the table names, by architecture."""
    name, impl = re.fullmatch(r"`(.+)` (.+)", row["rows of"]).groups()
    op, _, shape = name.partition(" ")
    found = {}
    for measured in newest_rows():
        fits = measured["op"] == op and measured["shape"].startswith(shape) and measured["impl"] == impl
        machines = [sm for machine, sm in MACHINES.items() if machine in measured["machine"]]
        if fits and machines:
            found.setdefault(machines[0], []).append(measured)
    return found


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row["rows of"].replace("`", ""))
def test_a_cell_is_what_the_rows_and_the_compilers_say(row):
    assert kernels(row)
    for kernel in kernels(row):
        assert row["without a GPU"] == ("emulated" if kernel.endswith("<>") else "interpreted")
        for sm in ARCHITECTURES:
            assert (row[sm] in ("compiled", "run")) == (sm in COMPILED[kernel]), (kernel, sm)
            assert row[sm] in ("compiled", "run") or (row[sm] == "PTX" and kernel.endswith("<>")), (kernel, sm)
    assert {sm for sm in ARCHITECTURES if row[sm] == "run"} == set(rows_of(row))


def test_every_kernel_is_in_the_table_and_every_measured_implementation_too():
    assert {kernel for row in SUPPORT for kernel in kernels(row)} == set(COMPILED) - {"probe_kernel<>"}
    claimed = [measured for row in SUPPORT for rows in rows_of(row).values() for measured in rows]
    on_gpus = [row for row in newest_rows() if row["isa"] == "" and row["op"] != "step" and row["impl"] != "reference"]
    missed = [row for row in on_gpus if row not in claimed]
    assert on_gpus and not missed, missed[:3]
