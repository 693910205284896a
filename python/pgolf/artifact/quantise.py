"""State dict -> coded tensors and back: which tensor is stored how, by the rule of the published systems.

Tensors of up to 65,536 values (so every scale, gain and gate) are float16, attention and MLP matrices int6, other
large ones (embeddings) int8. The surprise is in int8: codes come from the float32 scale, values from the stored one,
rounded to float16. Source: `mixed_quantize_int6` of openai/parameter-golf #1217.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_kernels.ops.int6_linear import quantize_int6
from pgolf_kernels.ops.int6_linear.reference import SMALLEST_SCALE, row_quantiles

from ..config import Config
from ..errors import InputError

INT8_QUANTILE = 0.9999984
CODE_MAX = {"int6": 31, "int8": 127}
ROLES = ("int6", "int8", "float16")


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """One tensor as it is stored.

    role "int6" or "int8": values are int8 codes [N, K], scale is float16 [N]; the tensor is values * scale in `shape`,
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


def tensor_role(name: str, shape: tuple[int, ...], float16_max_values: int = 65536) -> str:
    """How a tensor is stored; names are the published ones ("blocks.3.attn.c_q.weight", "tok_emb.weight")."""
    if math.prod(shape) <= float16_max_values or len(shape) < 2:
        return "float16"
    is_matrix = ".attn." in name or ".mlp." in name or ".proj." in name
    return "int6" if is_matrix else "int8"


def quantise_state(config: Config, state: dict[str, Tensor]) -> dict[str, CodedTensor]:
    """Code every tensor of a model's export by config's int6_clip and int6_floor.

    Raises:
        InputError: a tensor is not floating, not finite, or has values that float16 cannot hold.
    """
    return {name: quantise_tensor(config, name, tensor) for name, tensor in state.items()}


def quantise_tensor(config: Config, name: str, tensor: Tensor) -> CodedTensor:
    if not tensor.is_floating_point():
        raise InputError(f"pack: {name} must be a floating-point tensor, got {tensor.dtype}")
    tensor, shape = tensor.detach().float().cpu(), tuple(tensor.shape)
    if not tensor.isfinite().all():
        raise InputError(f"pack: {name} must be finite, got NaN or infinity; the training run has diverged")
    if not tensor.half().isfinite().all():
        raise InputError(f"pack: {name} must fit float16 (at most 65504), got {tensor.abs().max().item():g}")
    role = tensor_role(name, shape, config.float16_max_values)
    if role == "float16":
        return CodedTensor(role, shape, tensor.half())
    rows = tensor.reshape(shape[0], -1)
    if role == "int8":
        return CodedTensor(role, shape, *quantise_int8(rows, floor=config.int6_floor * 31 / 127))
    clip = int6_clip(config)
    try:
        weight = quantize_int6(rows, clip, config.int6_floor if isinstance(clip, str) else None)
    except ValueError as error:
        raise InputError(f"pack: {name}: {error}") from error
    return CodedTensor(role, shape, weight.codes(), weight.scale)


def int6_clip(config: Config) -> str | float:
    """config.int6_clip as quantize_int6 takes it. A number of deviations brings its own floor, 1e-10."""
    if config.int6_clip in ("search", "max"):
        return config.int6_clip
    try:
        clip = float(config.int6_clip)
    except ValueError:
        clip = math.nan
    if not (math.isfinite(clip) and clip > 0):
        raise InputError(f"config: int6_clip must be 'search', 'max' or a positive number, got {config.int6_clip!r}")
    return clip


def quantise_int8(w: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """w float32 [N, K] -> codes int8 [N, K], scale float16 [N]; clipped at a quantile of each row."""
    clip = row_quantiles(w, (INT8_QUANTILE,))[0]
    scale = (clip / 127).clamp_min(max(floor, SMALLEST_SCALE))
    clipped = torch.minimum(torch.maximum(w, -clip[:, None]), clip[:, None])
    return (clipped / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale.half()


def dequantise_state(coded: dict[str, CodedTensor]) -> dict[str, Tensor]:
    """float32 tensors in their published shapes."""
    return {name: tensor.dequantize() for name, tensor in coded.items()}
