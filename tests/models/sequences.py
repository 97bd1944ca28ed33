"""Models of the zoo over sequences: recurrent ones, mixers, attention with masks and memories."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.topologies import WIDTH

VOCABULARY = 32
PADDING = 0


class LSTM(nn.Module):
    """Three recurrent layers with linear layers between; each starts from the last one's state."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 8)
        self.lstm1 = nn.LSTM(8, 8, batch_first=True)
        self.linear1 = nn.Linear(8, 8)
        self.lstm2 = nn.LSTM(8, 8, batch_first=True)
        self.linear2 = nn.Linear(8, 8)
        self.lstm3 = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.lstm1(self.inlet(x))
        x, state = self.lstm2(torch.tanh(self.linear1(x)), state)
        x, (_, cell) = self.lstm3(torch.tanh(self.linear2(x)), state)
        summary = cell[-1].unsqueeze(1).expand_as(x)
        return self.head(torch.cat((x, summary), dim=-1))


class MixerMLP(nn.Sequential):
    """LayerNorm and a two-layer perceptron over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )


class MixerBlock(nn.Module):
    """Mix tokens, then channels (Tolstikhin et al., NeurIPS 2021)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = MixerMLP(tokens)
        self.channels = MixerMLP(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


def mixer() -> nn.Module:
    """Chain four mixer blocks over tokens `[B, 6, WIDTH]`."""
    blocks = [MixerBlock(tokens=6) for _ in range(4)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.LayerNorm(WIDTH))


class Attention(nn.Module):
    """Multi-head attention of a sequence to a memory, with an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (2, -1)).transpose(1, 2)
            for projected in (self.query(x), self.key(memory), self.value(memory))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """A pre-norm transformer layer; with a memory it also attends to that."""

    def __init__(self, *, cross: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.cross = Attention() if cross else None
        self.mlp = MixerMLP(WIDTH)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, mask)
        if self.cross is not None and memory is not None:
            x = x + self.cross(x, memory)
        return x + self.mlp(x)


class MaskedEncoder(nn.Module):
    """A transformer encoder whose layers all need the padding mask of its token ids."""

    def __init__(self, mask_dtype: torch.dtype) -> None:
        super().__init__()
        self.mask_dtype = mask_dtype
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != PADDING)[:, None, None, :]
        if self.mask_dtype.is_floating_point:
            mask = (1.0 - mask.to(self.mask_dtype)) * -1e4
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(dim=1))


class EncoderDecoder(nn.Module):
    """A translation model: every decoder layer reads the memory that the encoder left."""

    def __init__(self) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.target_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(AttentionBlock() for _ in range(2))
        self.decoder = nn.ModuleList(AttentionBlock(cross=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source_embedding(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.target_embedding(target)
        for block in self.decoder:
            x = block(x, memory=memory)
        return self.head(x)


class VisionTransformer(nn.Module):
    """Image patches with a class token; the batch size, an int, is read early and used late."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(4))
        self.head = nn.Linear(5 * WIDTH, 4)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(batch, -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.reshape(batch, -1))


def container_transformer() -> nn.Module:
    """Stack four layers in a torch container, one leaf to plain tracing."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), encoder, nn.Linear(WIDTH, 4))


class TiedLanguageModel(nn.Module):
    """A language model whose first and last layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(64, WIDTH))
        self.blocks = nn.ModuleList(MixerMLP(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.size(1)]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
