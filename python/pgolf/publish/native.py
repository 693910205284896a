"""The C++ and CUDA sources of a bundle: the kernels of its ops, what those include, and bindings of them alone."""

import json
import re
from pathlib import Path

import pgolf_kernels

from ..errors import InputError

CSRC = Path(pgolf_kernels.__file__).parent.parent / "csrc"
FLAGS = "flags.json"
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)
_INCLUDE = re.compile(r'^ *# *include "([^"]+)"', re.MULTILINE)


def gather(ops: dict[str, list[str]]) -> tuple[dict[str, str], dict]:
    """The sources of some ops.

    Args:
        ops: {"cpu": names, "cuda": names}.

    Returns:
        Text without comments by path below csrc, and csrc/flags.json.

    Raises:
        InputError: there are ops, but pgolf_kernels was installed without its sources.
    """
    if not any(ops.values()):
        return {}, {}
    if not (CSRC / FLAGS).is_file():
        names = ", ".join(sorted({*ops["cpu"], *ops["cuda"]}))
        raise InputError(
            f"bundle: the run used compiled kernels of {names}, whose sources must be at {CSRC}, but pgolf_kernels was "
            "installed without them; bundle from a source checkout, or take --kernels reference, with which a score "
            "may differ in its last digits"
        )
    flags = json.loads((CSRC / FLAGS).read_text())
    sources, roots = {}, []
    for kind, names in ops.items():
        if names:
            bindings = f"bindings_{kind}.cpp"
            sources[bindings] = strip(trim_bindings((CSRC / bindings).read_text(), names))
    for op in ops["cpu"]:
        roots += [f"{op}/{op}_cpu.cpp", *(f"{op}/{op}_{level}.cpp" for level in flags["isa_adds"])]
    for op in ops["cuda"]:
        roots.append(f"{op}/{op}_cuda.cu")
    roots += ["common/device_cuda.cu"] * bool(ops["cuda"])
    waiting = [*roots, *(path for text in sources.values() for path in _INCLUDE.findall(text))]
    while waiting:
        if (path := waiting.pop()) not in sources and (CSRC / path).is_file():
            sources[path] = strip((CSRC / path).read_text())
            waiting += _INCLUDE.findall(sources[path])
    return dict(sorted(sources.items())), flags


def trim_bindings(text: str, ops: list[str]) -> str:
    """bindings_{cpu,cuda}.cpp with what binds these ops alone: their headers, their bind_<op> and its call."""

    def unwanted(op: str) -> bool:
        return op not in ops and op != "isa"

    for op in sorted(set(re.findall(r"^void bind_(\w+)\(", text, re.MULTILINE))):
        if unwanted(op):
            text = re.sub(rf"^void bind_{op}\(.*?^}}\n", "", text, flags=re.MULTILINE | re.DOTALL)
            mentions = rf'^  bind_{op}\(m\);\n|^#include "(?:{op}/|common/{op}\.h).*\n'
            text = re.sub(mentions, "", text, flags=re.MULTILINE)
    return text


def strip(text: str) -> str:
    """C++ without comments, blank lines and indentation."""
    bare = _TOKEN.sub(lambda found: " " if found[0][0] == "/" else found[0], text)
    return "".join(f"{line.strip()}\n" for line in bare.splitlines() if line.strip())
