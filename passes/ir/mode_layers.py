"""Layers that follow train() and eval() in place of operators with a fixed training flag.

A captured graph holds `scaled_dot_product_attention(..., dropout_p=0.1)` as a constant; these
modules take the place of such nodes. Artifacts store them by class name and options.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Apply scaled dot-product attention with dropout in training mode only.

    Args:
        dropout_p: Probability of dropping an attention weight.
        is_causal: Whether to mask later positions.
    """

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
        """Attend to keys and values.

        Args:
            query: Queries `[B, H, T, D]`.
            key: Keys `[B, H, S, D]`.
            value: Values `[B, H, S, D]`.
            attn_mask: Mask that broadcasts to `[B, H, T, S]`: True, or the bias to add.
            scale: Factor of the scores; `D**-0.5` if None.
            enable_gqa: Whether keys and values may have fewer heads than queries.

        Returns:
            The mean of the values under the attention weights, `[B, H, T, D]`.
        """
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the options for the module's `repr`."""
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}"


def dropouts(network: nn.Module) -> list[nn.Module]:
    """Return the modules that drop values at random in training mode and change nothing else."""
    return [
        module
        for module in network.modules()
        if isinstance(module, Attention)
        or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
    ]


class BatchNorm(nn.Module):
    """Apply batch normalization with running statistics that another module owns.

    Args:
        momentum: Weight of the batch in the update of the running statistics.
        eps: Constant added to the variance.
    """

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
        """Normalize `[B, C, ...]`: by the batch in training mode, which updates the statistics."""
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, self.training, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        """Return the options for the module's `repr`."""
        return f"momentum={self.momentum}, eps={self.eps}"
