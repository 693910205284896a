"""State dict -> coded tensors and back: which tensor is stored how, by the rule of the published systems.

Tensors of up to 65,536 values (so every scale, gain and gate) are float16, attention and MLP matrices int6, other
large ones (embeddings) int8; bits, clip and GPTQ are the config's, by kind of tensor. The surprise is in the clip
"quantile" of embeddings: codes come from the float32 scale, values from the stored one, rounded to float16.
Source: `mixed_quantize_int6` of openai/parameter-golf #1217.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_kernels.ops.int6_linear import reference
from pgolf_kernels.ops.int6_linear.reference import SMALLEST_SCALE, row_quantiles

from ..config import Config
from ..config_rules import clip_value
from ..errors import InputError
from . import gptq

QUANTILE = 0.9999984
CODE_MAX = {"int5": 15, "int6": 31, "int7": 63, "int8": 127}
ROLES = (*CODE_MAX, "float16")
KINDS = ("attn", "mlp", "embed", "float16")  # of tensors, see tensor_kind
EMBEDDING = "tok_emb.weight"
_OBSERVED = re.compile(r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(fc|proj))\.weight")


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """One tensor as it is stored.

    role "int5" to "int8": values are int8 codes [N, K], scale is float16 [N]; the tensor is values * scale in `shape`,
    whose first dimension is N. role "float16": values are float16 in `shape`, scale is None.
    """

    role: str
    shape: tuple[int, ...]
    values: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        shape, values, scale = self.shape, self.values, self.scale
        if self.role not in ROLES:
            raise InputError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if self.role == "float16":
            if values.dtype != torch.float16 or values.shape != shape or scale is not None:
                raise InputError(f"values must be float16 {shape}, got {values.dtype} {tuple(values.shape)}")
            if not values.isfinite().all():
                raise InputError("values must be finite, got NaN or infinity")
            return
        matrix = (shape[0], math.prod(shape[1:])) if shape else None
        if values.dtype != torch.int8 or values.shape != matrix or values.numel() == 0:
            raise InputError(f"codes must be int8 {matrix}, not empty, got {values.dtype} {tuple(values.shape)}")
        largest = max(abs(int(v)) for v in values.aminmax())
        if largest > CODE_MAX[self.role]:
            raise InputError(f"{self.role} codes must lie within {CODE_MAX[self.role]} of 0, got {largest}")
        if scale is None or scale.dtype != torch.float16 or scale.shape != shape[:1]:
            raise InputError(f"scale must be float16 {shape[:1]}")
        if not (scale.isfinite() & (scale > 0)).all():
            raise InputError("every scale must be finite and above 0")

    def dequantize(self) -> Tensor:
        """float32 in `shape`."""
        if self.role == "float16":
            return self.values.float()
        return (self.values.float() * self.scale.float()[:, None]).reshape(self.shape)


@dataclass(frozen=True)
class Rounding:
    """How one kind of tensor becomes codes in -code_max..code_max; floor is the least step of the clips with a name."""

    role: str
    code_max: int
    clip: str | float
    floor: float
    gptq: bool

    @classmethod
    def of(cls, config: Config, kind: str) -> "Rounding":
        """kind: "attn", "mlp" or "embed"."""
        role = f"int{getattr(config, f'{kind}_bits')}"
        text = {"attn": config.int6_clip, "mlp": config.mlp_clip or config.int6_clip, "embed": config.embed_clip}[kind]
        clip, code_max = clip_value(text), CODE_MAX[role]
        floor = config.int6_floor * 31 / code_max if isinstance(clip, str) else 0.0
        return cls(role, code_max, clip, floor, getattr(config, f"{kind}_gptq"))

    def scales(self, w: Tensor) -> Tensor:
        """The scales to try for w [N, K]: float16 [candidates, N], all positive."""
        if self.clip == "quantile":
            return _quantile_scale(w, self.floor, self.code_max)[1].half()[None]
        return reference.candidate_scales(w, self.clip, self.floor, self.code_max)

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scale float16 [N] of w float32 [N, K], each value to its nearest code."""
        if self.clip == "quantile":
            return quantise_at_quantile(w, self.floor, self.code_max)
        return reference.quantize(w, self.clip, self.floor, self.code_max)


def tensor_kind(config: Config, name: str, shape: tuple[int, ...]) -> str:
    """One of KINDS; names are the published ones ("blocks.3.attn.c_q.weight", "tok_emb.weight")."""
    if math.prod(shape) <= config.float16_max_values or len(shape) < 2:
        return "float16"
    if ".mlp." in name:
        return "mlp"
    return "attn" if ".attn." in name or ".proj." in name else "embed"


def tensor_role(config: Config, name: str, shape: tuple[int, ...]) -> str:
    """How a tensor is stored, one of ROLES."""
    kind = tensor_kind(config, name, shape)
    return kind if kind == "float16" else Rounding.of(config, kind).role


def hessian_name(config: Config, name: str, shape: tuple[int, ...]) -> str | None:
    """The tensor under whose name calibration keeps the Hessian that GPTQ rounds this one by; None: no GPTQ.

    Queries, keys and values have one input. The small projections of bigrams and value embeddings and the tables that
    no input is multiplied by have no Hessian, as in the published systems.
    """
    kind = tensor_kind(config, name, shape)
    if kind == "float16" or not Rounding.of(config, kind).gptq:
        return None
    if not (name == EMBEDDING or _OBSERVED.fullmatch(name)):
        return None
    return re.sub(r"attn\.c_[kv]", "attn.c_q", name)


def wanted_hessians(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What calibration has to observe for an export of these shapes: name -> width of the input."""
    named = {hessian_name(config, name, shape): shape for name, shape in shapes.items()}
    return {name: shape[1] for name, shape in named.items() if name is not None}


def quantise_state(
    config: Config,
    state: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, CodedTensor]:
    """Code every tensor of a model's export as its config says.

    Args:
        hessians: sums of x x^T, float32 [K, K], under the names of `wanted_hessians`; needed if config uses GPTQ.
        on_progress: called with (tensors done, their number).

    Raises:
        InputError: a tensor is not floating, not finite, or has values that float16 cannot hold; a Hessian is missing,
            not finite or of another size.
    """
    rows, groups, coded = {}, {}, {}
    for name, tensor in state.items():
        check_tensor(name, tensor)
        shape = tuple(tensor.shape)
        group = hessian_name(config, name, shape)
        groups.setdefault(name if group is None else group, []).append(name)
        tensor = tensor.detach().float().cpu()
        rows[name] = tensor.half() if tensor_kind(config, name, shape) == "float16" else tensor.reshape(shape[0], -1)
        if group is not None:
            check_hessian(group, shape[1], hessians)
    for group, names in groups.items():
        shapes = [tuple(state[name].shape) for name in names]
        matrices = [rows.pop(name) for name in names]
        kind = tensor_kind(config, names[0], shapes[0])
        if kind == "float16":
            coded[group] = CodedTensor("float16", shapes[0], matrices[0])
        else:
            how = Rounding.of(config, kind)
            hessian = hessians[group] if hessian_name(config, names[0], shapes[0]) else None
            results = _round_group(config, how, names, matrices, hessian)
            for name, shape, result in zip(names, shapes, results, strict=True):
                coded[name] = CodedTensor(how.role, shape, *result)
        if on_progress:
            on_progress(len(coded), len(state))
    return {name: coded[name] for name in state}


def _round_group(
    config: Config, how: Rounding, names: list[str], matrices: list[Tensor], hessian: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Codes and scale of matrices that have one input; without a usable Hessian each value goes to its nearest code."""
    scales = [how.scales(w) for w in matrices]
    for name, scale in zip(names, scales, strict=True):
        if not scale.isfinite().all():
            raise InputError(f"pack: {name}: every scale must fit float16 (65504), got a larger one; use a lower clip")
    factor = None
    if hessian is not None:
        factor = gptq.factorise(hessian, gptq.Damping(config.gptq_damping, config.gptq_damping_times))
    if factor is None:
        return [how.round(w) for w in matrices]
    return gptq.quantise_together(matrices, scales, factor, how.code_max)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises InputError if a tensor cannot be stored."""
    if not tensor.is_floating_point():
        raise InputError(f"pack: {name} must be a floating-point tensor, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise InputError(f"pack: {name} must be finite, got NaN or infinity; the training run has diverged")
    if not tensor.half().isfinite().all():
        raise InputError(f"pack: {name} must fit float16 (at most 65504), got {tensor.abs().max().item():g}")


def check_hessian(name: str, width: int, hessians: Mapping[str, Tensor] | None) -> None:
    """Raises InputError if the Hessian called `name` is missing or cannot be one of an input of this width."""
    if hessians is None or name not in hessians:
        raise InputError(f"pack: GPTQ needs the Hessian of {name}'s input, got none; calibrate the run first")
    h = hessians[name]
    if h.shape != (width, width) or not h.is_floating_point():
        got = f"{h.dtype} {tuple(h.shape)}"
        raise InputError(f"pack: the Hessian of {name} must be floating {(width, width)}, got {got}; calibrate again")
    if not h.isfinite().all():
        raise InputError(f"pack: the Hessian of {name} must be finite, got NaN or infinity; calibrate again")
    if h.diagonal().min() < 0:
        raise InputError(f"pack: the diagonal of {name}'s Hessian must not be negative, got {h.diagonal().min():g}")


def _quantile_scale(w: Tensor, floor: float, code_max: int) -> tuple[Tensor, Tensor]:
    clip = row_quantiles(w, (QUANTILE,))[0]
    return clip, (clip / code_max).clamp_min(max(floor, SMALLEST_SCALE))


def quantise_at_quantile(w: Tensor, floor: float, code_max: int) -> tuple[Tensor, Tensor]:
    """w float32 [N, K] -> codes int8 [N, K], scale float16 [N]; clipped at a quantile of each row."""
    clip, scale = _quantile_scale(w, floor, code_max)
    clipped = torch.minimum(torch.maximum(w, -clip[:, None]), clip[:, None])
    return (clipped / scale[:, None]).round().clamp(-code_max, code_max).to(torch.int8), scale.half()


def dequantise_state(coded: Mapping[str, CodedTensor]) -> dict[str, Tensor]:
    """float32 tensors in their published shapes."""
    return {name: tensor.dequantize() for name, tensor in coded.items()}


def relative_errors(config: Config, state: Mapping[str, Tensor], coded: Mapping[str, CodedTensor]) -> dict[str, float]:
    """For each kind of tensor there is: |W - dequantised W| / |W|, Frobenius norms over all its tensors."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

    errors = {}
    for kind in KINDS:
        names = [n for n, t in state.items() if tensor_kind(config, n, tuple(t.shape)) == kind]
        if names:
            size = norm(state[n] for n in names)
            error = norm(state[n].cpu() - coded[n].dequantize() for n in names)
            errors[kind] = error / size if size else 0.0
    return errors
