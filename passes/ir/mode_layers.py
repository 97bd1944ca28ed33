"""Layers that follow the mode where an exported graph had a fixed flag."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Attention", "BatchNorm", "dropouts"]


class Attention(nn.Module):
    """Scaled dot-product attention whose dropout is active in training mode only."""

    def __init__(self, dropout_p: float, is_causal: bool = False) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attend; shapes `[B, H, T, D]`."""
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}"


def dropouts(network: nn.Module) -> list[nn.Module]:
    """The modules of a network that drop values at random in training mode, and do no more then."""
    return [
        module
        for module in network.modules()
        if isinstance(module, Attention)
        or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
    ]


class BatchNorm(nn.Module):
    """Batch normalisation over statistics that another module owns, by the mode that it is in."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalise `[B, C, ...]`; in training mode by the batch, updating the statistics."""
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, self.training, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"momentum={self.momentum}, eps={self.eps}"
