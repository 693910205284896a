"""Causal attention with grouped key/value heads and the exclusive (XSA) epilogue."""

from .op import causal_attention

__all__ = ["causal_attention"]
