"""The ops as modules: LeakyReLU2MLP, Int6Linear, SoftcappedHead. MLP and head have no biases, as in the trainer."""

import torch
from torch import Tensor, nn

from .dispatch import require
from .ops.int6_linear import Int6Weight, int6_linear, quantize_int6
from .ops.leaky_relu2_mlp import leaky_relu2_mlp
from .ops.softcapped_cross_entropy import softcapped_cross_entropy


def _uniform(rows: int, cols: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A weight [rows, cols] with nn.Linear's initial values."""
    return nn.Parameter(torch.empty(rows, cols, device=device, dtype=dtype).uniform_(-(cols**-0.5), cols**-0.5))


class LeakyReLU2MLP(nn.Module):
    """y = leaky(x w_up^T)^2 w_down^T; see leaky_relu2_mlp.

    Args:
        dim: features of x and y.
        hidden_dim: features in between.
        negative_slope: slope of leaky below 0.
    """

    def __init__(self, dim: int, hidden_dim: int, negative_slope: float = 0.5, device=None, dtype=None) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.w_up = _uniform(hidden_dim, dim, device, dtype)
        self.w_down = _uniform(dim, hidden_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        return leaky_relu2_mlp(x, self.w_up, self.w_down, self.negative_slope)

    def extra_repr(self) -> str:
        hidden_dim, dim = self.w_up.shape
        return f"dim={dim}, hidden_dim={hidden_dim}, negative_slope={self.negative_slope}"


class Int6Linear(nn.Module):
    """A linear layer over frozen int6 weights; see int6_linear. The state dict holds the packed codes and the scales.

    Args:
        weight: from quantize_int6 or Int6Weight.from_bytes.
        bias: [N] or None; kept as a buffer.
    """

    def __init__(self, weight: Int6Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", weight.packed)
        # As bits, because module.bfloat16() would round float16 scales away.
        self.register_buffer("scale_bits", weight.scale.view(torch.int16))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, clip: str | float = "search", floor: float | None = None) -> "Int6Linear":
        """Quantise a trained layer; clip and floor as in quantize_int6."""
        require(isinstance(linear, nn.Linear), "Int6Linear", "linear must be a torch.nn.Linear", type(linear))
        return cls(quantize_int6(linear.weight, clip, floor), linear.bias)

    @property
    def weight(self) -> Int6Weight:
        """The weights, sharing the buffers' memory."""
        return Int6Weight(self.packed, self.scale_bits.view(torch.float16), (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        return int6_linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SoftcappedHead(nn.Module):
    """A language-model head: the loss without materialised logits in training, capped logits for sampling.

    Args:
        dim: features of the hidden states.
        vocab_size: rows of the weight.
        softcap: bound on the logits' magnitude, in nats.
        weight: an embedding [vocab_size, dim] to tie to; None makes a parameter of its own.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        softcap: float = 30.0,
        weight: nn.Parameter | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if weight is not None:
            fits = tuple(weight.shape) == (vocab_size, dim)
            require(fits, "SoftcappedHead", f"weight must be [{vocab_size}, {dim}]", list(weight.shape))
        self.softcap = softcap
        self.weight = _uniform(vocab_size, dim, device, dtype) if weight is None else weight

    def forward(self, hidden: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
        """Cross-entropy of hidden [..., dim] against targets [...]; see softcapped_cross_entropy."""
        return softcapped_cross_entropy(hidden, self.weight, targets, self.softcap, ignore_index, reduction)

    def logits(self, hidden: Tensor) -> Tensor:
        """Capped logits [..., vocab_size], in float32 beyond the product."""
        return self.softcap * (nn.functional.linear(hidden, self.weight).float() / self.softcap).tanh()

    def extra_repr(self) -> str:
        vocab_size, dim = self.weight.shape
        return f"dim={dim}, vocab_size={vocab_size}, softcap={self.softcap}"
