"""A GPT-style language model: a decoder-only transformer with tied embedding and head.

Compile it with `pnn-compile examples/decoder.py -n 3`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """Let each position attend to itself and to the positions before it.

    Vaswani et al., "Attention is all you need" (NeurIPS 2017), section 3.2. Attention weights are
    not dropped: `scaled_dot_product_attention` would need `self.training` as an argument, and a
    captured graph keeps the value it saw.

    Args:
        width: Features of a token, a multiple of `heads`.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, width]` to `[B, T, width]`."""
        # [B, T, 3 * width] to [B, T, 3, heads, width / heads] to three of [B, heads, T, ...]
        packed = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Add attention and a two-layer perceptron to the residual stream, each after a LayerNorm.

    The pre-LN order of Radford et al., "Language models are unsupervised multitask learners"
    (2019), section 2.3.

    Args:
        width: Features of a token.
        heads: Number of attention heads.
        dropout: Probability that a feature of a branch is dropped before it is added.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.attention_dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, width]` to `[B, T, width]`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Predict the next token at every position of a sequence.

    Args:
        layers: Number of decoder blocks.
        width: Features of a token, a multiple of `heads`.
        heads: Number of attention heads.
        vocabulary: Number of tokens.
        context: Length of the longest sequence.
        dropout: Dropout probability of the embedding and of the residual branches.
        tie_weights: Whether embedding and head share one matrix (Press and Wolf, EACL 2017).

    Raises:
        ValueError: If the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        context: int,
        dropout: float,
        tie_weights: bool,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads (got {width} and {heads})")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        nn.init.normal_(self.position_embedding, std=0.02)
        self.apply(initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return next-token logits `[B, T, vocabulary]` of token ids `[B, T]`, T <= context."""
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.size(1)]
        x = self.blocks(self.dropout(x))
        return self.head(self.norm(x))


def initialize(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02²) and zero the biases, as GPT-2 does."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model(
    layers: int = 12,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = 256,
    context: int = 128,
    dropout: float = 0.1,
    tie_weights: bool = True,
) -> Decoder:
    """Build a byte-level decoder; the defaults give a small one for a laptop."""
    return Decoder(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        context=context,
        dropout=dropout,
        tie_weights=tie_weights,
    )


def example_inputs(batch: int = 2, length: int = 128, vocabulary: int = 256) -> tuple[Tensor, ...]:
    """Return one batch of random token ids `[batch, length]`, int64."""
    return (torch.randint(vocabulary, (batch, length)),)
