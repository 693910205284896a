"""`pgolf bundle`: one train_gpt.py that holds only what a run uses, and counts as the code of a submission.

    train_gpt.py            two lines, which unfold to the other one: LZMA as base85
    train_gpt_plain.py      the program: sources without comments in a dictionary, an import hook, the run's config

Which modules: what training, packing and the methods of the run reach (inline.py, parts.py). Which kernels: those of
the implementations that the run's log and its scores name; C++ is compiled at first use, with the flags of setup.py, so
that a score has the same bits as where it was made. The surprise is how little the wrapper depends on the compressor:
LZMA2's presets 6 to 9 give the same bytes, brotli is 1 % larger.
"""

import ast
import base64
import dataclasses
import functools
import json
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pgolf_kernels import tiles

from .. import run
from ..artifact.pack import read_content
from ..config import Config
from ..errors import InputError
from ..parts import MODULES, needed_parts
from . import inline, native

PROGRAM, PLAIN = "train_gpt.py", "train_gpt_plain.py"
KERNELS = ("run", "reference", "cpu", "gpu")
OPS = ("causal_attention", "leaky_relu2_mlp", "newton_schulz", "slot", "softcapped_cross_entropy")
CUDA_OPS = ("slot",)  # of OPS, those with CUDA sources
# Commands of the house and what serves them; int6 products are for sampling.
NEVER = {"pgolf.presets", "pgolf.cli", "pgolf.data.corpus", "pgolf.publish", "pgolf.publish.bundle"}
NEVER |= {f"pgolf_kernels.ops.int6_linear.{name}" for name in ("op", "weight", "quantize", "cpu", "gpu")}
GPU_MODULES = {f"pgolf_kernels.{name}" for name in ("multi_tensor", "tiles", "optim.adamw_pass", "optim.muon_passes")}
_BY_GPU = ("triton_kernel", "megakernel", "cuda_kernel")
GPU_MODULES |= {f"pgolf_kernels.ops.{op}.{name}" for op in OPS for name in _BY_GPU}
LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 0, "pb": 0}


@dataclass(frozen=True)
class BundleReport:
    """What was written; sizes in bytes. counted_bytes is the size of PROGRAM, which is wrapped or plain."""

    path: Path
    counted_bytes: int
    plain_bytes: int
    wrapped_bytes: int
    modules: int
    native_files: int
    kernels: dict[str, list[str]]  # by op: "cpu", "triton", "cuda"; an op with none runs its reference
    parts: list[str]  # of parts.py

    def as_dict(self) -> dict:
        """All of it as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Plan:
    """What a bundle is made of: a config, its parts, and the kinds of kernels of each op."""

    config: Config
    parts: frozenset[str]
    kernels: tuple[tuple[str, tuple[str, ...]], ...]


def write_bundle(
    source: Path, out: Path, *, kernels: str = "run", methods: Iterable[str] = (), form: str = "both"
) -> BundleReport:
    """Write the program of a run into a directory.

    Args:
        source: a run directory, or an artifact.
        out: the directory; it is made, and files of the same names in it are replaced.
        kernels: "run", the implementations that the run has used; "reference", none; or all for a "cpu" or "gpu".
        methods: ways of scoring that it must know beside the config's eval_stages and those in scores.json.
        form: "wrapped" or "plain" for that form alone, as train_gpt.py; "both" for PROGRAM, wrapped, and PLAIN.

    Raises:
        InputError: source is neither, is damaged, or does not say which implementations it ran; sources of those are
            missing here; `out` cannot be written.
    """
    if form not in ("both", "wrapped", "plain"):
        raise InputError(f"bundle: form must be both, wrapped or plain, got {form!r}")
    made_from = plan(source, kernels, methods)
    plain, num_modules, num_native = _render(made_from)
    wrapped = wrap(plain)
    counted = plain if form == "plain" else wrapped
    run.write_atomically(Path(out) / PROGRAM, counted)
    if form == "both":
        run.write_atomically(Path(out) / PLAIN, plain)
    return BundleReport(
        path=Path(out) / PROGRAM,
        counted_bytes=len(counted),
        plain_bytes=len(plain),
        wrapped_bytes=len(wrapped),
        modules=num_modules,
        native_files=num_native,
        kernels={op: list(kinds) for op, kinds in made_from.kernels},
        parts=sorted(made_from.parts),
    )


def counted_bytes(config: Config, extra: Mapping[str, object]) -> int:
    """What the wrapped program of a config takes, before it is scored.

    Args:
        extra: of the artifact's header; without the implementations of its training a CPU's are counted.
    """
    record = _recorded(extra)
    chosen = _chosen([record]) if record else dict.fromkeys(OPS, ("cpu",))
    parts = frozenset(needed_parts(config))
    try:
        return len(wrap(_render(Plan(config, parts, _of_parts(chosen, parts)))[0]))
    except InputError:  # installed without sources
        return len(wrap(_render(Plan(config, parts, ()))[0]))


def plan(source: Path, kernels: str = "run", methods: Iterable[str] = ()) -> Plan:
    """What the bundle of a run directory or an artifact is made of; arguments and errors of `write_bundle`."""
    if kernels not in KERNELS:
        raise InputError(f"bundle: kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    source = Path(source)
    if source.is_dir():
        config = run.read_config(source)
        record = [run.implementations(source)]
        folder = source
        if (source / run.ARTIFACT).exists():
            read_content(source / run.ARTIFACT)  # a program is of no use beside a damaged artifact
    else:
        header = read_content(source).header
        config, folder = header.config, source.parent
        record = [_recorded(header.extra)]
    parts = needed_parts(config, methods)
    for score in run.read_scores(folder).values():
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in score.get("settings", {}).items()}
        parts |= needed_parts(config.replace(**settings), [score["method"]])
        record.append(score.get("implementations", {}))
    if kernels == "run":
        if not any(record):
            raise InputError(
                f"{source}: neither a log nor scores.json says which implementations it ran; name the kernels with "
                "--kernels cpu, gpu or reference"
            )
        chosen = _chosen(record)
    else:
        chosen = dict.fromkeys(OPS, {"reference": (), "cpu": ("cpu",), "gpu": ("cuda", "triton")}[kernels])
    return Plan(config, frozenset(parts), _of_parts(chosen, parts))


def _recorded(extra: Mapping[str, object]) -> dict[str, str]:
    """The implementations that a header names; it may hold anything."""
    found = extra.get(run.IMPLEMENTATIONS)
    items = found.items() if isinstance(found, dict) else ()
    return {op: implementation for op, implementation in items if isinstance(implementation, str)}


def _chosen(record: list[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The kinds of kernels of each op by what was recorded.

    A record names what an op ran last, which may be its reference for a small input: such an op, and one that no record
    names, is taken to run whatever kinds the others ran.
    """
    kinds: dict[str, set[str]] = {op: set() for op in OPS}
    for implementations in record:
        for name, implementation in implementations.items():
            op = next((op for op in OPS if name.startswith(op)), None)
            kind = implementation.partition("_")[0]
            if op and kind in ("cpu", "triton", "cuda"):
                kinds[op].add(kind)
    every = set().union(*kinds.values())
    every |= {"cuda"} if "triton" in every else set()
    return {op: tuple(sorted(found or every)) for op, found in kinds.items()}


def _of_parts(chosen: dict[str, tuple[str, ...]], parts: Iterable[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((op, kinds) for op, kinds in sorted(chosen.items()) if op != "slot" or "slot" in parts)


@functools.cache
def _render(made_from: Plan) -> tuple[bytes, int, int]:
    """The plain program, and how many modules and native files are in it."""
    kinds = dict(made_from.kernels)
    on_gpu = any({"triton", "cuda"} & set(found) for found in kinds.values())
    left_out = NEVER | {m for part, ms in MODULES.items() if part not in made_from.parts for m in ms}
    left_out |= set() if on_gpu else GPU_MODULES
    modules = _modules(frozenset(left_out))
    texts = modules.sources | (_tiles() if on_gpu else {})
    ops = {"cpu": [op for op in kinds if "cpu" in kinds[op]]}
    ops["cuda"] = [op for op in kinds if "cuda" in kinds[op] and op in CUDA_OPS]
    sources, flags = native.gather(ops)
    head, build = [_head("bundle_head.py")], "None"
    if sources:
        head.append(_head("bundle_build.py"))
        build = f"Builder(NATIVE, {ops!r}, {flags!r})"
    lines = [
        "# Made by `pgolf bundle`. Needs PyTorch, numpy, sentencepiece, brotli, safetensors; see --help.",
        f"SOURCES = {_dictionary(texts)}",
        f"NATIVE = {_dictionary(sources)}",
        *head,
        f"LEFT_OUT = {sorted(modules.left_out)!r}",
        f"PACKAGES = {sorted(modules.packages)!r}",
        f"PROGRAM = Program(__file__, SOURCES, PACKAGES, LEFT_OUT, {build})",
        'if __name__ == "__main__":',
        f" parts = set({sorted(made_from.parts)!r})",
        f" sys.exit(start(PROGRAM, {_text(made_from.config.to_json())}, parts, {not on_gpu}))",
    ]
    return ("\n".join(lines) + "\n").encode(), len(modules.sources), len(sources)


@functools.cache
def _modules(left_out: frozenset[str]) -> inline.Modules:
    return inline.gather(("pgolf.script",), left_out)


def _head(name: str) -> str:
    return inline.strip(ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8")), name)


def _tiles() -> dict[str, str]:
    return {f"pgolf_kernels/tiles/{name}.json": json.dumps(table) for name, table in tiles.shipped().items()}


def _dictionary(texts: Mapping[str, str]) -> str:
    return "{\n" + "".join(f"{name!r}: {_text(text)},\n" for name, text in texts.items()) + "}"


def _text(text: str) -> str:
    """A string literal that shows its lines."""
    return '"""' + text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') + '"""'


def wrap(program: bytes) -> bytes:
    """Two lines that unfold to `program` and run it: a raw LZMA2 stream as base85."""
    stream = lzma.compress(program, format=lzma.FORMAT_RAW, filters=[LZMA2])
    # The text is not in the line that runs it: a traceback would print it.
    code = (
        f'import lzma,base64;p="{base64.b85encode(stream).decode()}"\n'
        'exec(compile(lzma.decompress(base64.b85decode(p),3,None,[{"id":33,"preset":9}]),__file__,"exec"))\n'
    )
    return code.encode()


def unwrap(program: bytes) -> bytes:
    """The inverse of `wrap`."""
    stream = base64.b85decode(program.split(b'"')[1])
    return lzma.decompress(stream, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
