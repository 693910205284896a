"""The LeakyReLU^2 MLP as one op."""

from .op import leaky_relu2_mlp

__all__ = ["leaky_relu2_mlp"]
