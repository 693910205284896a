"""Int6 weights and the linear layer over them."""

from .op import int6_linear
from .quantize import quantize_int6
from .weight import Int6Weight

__all__ = ["Int6Weight", "int6_linear", "quantize_int6"]
