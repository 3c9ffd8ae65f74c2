"""BERT for sentence classification in plain PyTorch, so that the model suite needs no other package.

The layers, their order and their dropouts are those of Hugging Face's BertForSequenceClassification with scaled dot
product attention; a test compares the two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
NORM_EPS = 1e-12


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    inner: int


SIZES = {
    "bert-large": Size(24, 1024, 16, 4096),
    "bert-base": Size(12, 768, 12, 3072),
    "bert-large-4-layers": Size(4, 1024, 16, 4096),
    "bert-base-4-layers": Size(4, 768, 12, 3072),
    "minilm": Size(6, 384, 12, 1536),
    "tiny": Size(2, 64, 2, 256),
}


class Embeddings(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, size.width, padding_idx=0)
        self.positions = nn.Embedding(POSITIONS, size.width)
        self.segments = nn.Embedding(SEGMENTS, size.width)
        self.norm = nn.LayerNorm(size.width, NORM_EPS)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.norm(self.words(tokens) + self.segments(segments) + self.positions(positions)))


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query = nn.Linear(size.width, size.width)
        self.key = nn.Linear(size.width, size.width)
        self.value = nn.Linear(size.width, size.width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        p = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = Attention(size)
        self.attention_output = nn.Linear(size.width, size.width)
        self.attention_norm = nn.LayerNorm(size.width, NORM_EPS)
        self.inner = nn.Linear(size.width, size.inner)
        self.output = nn.Linear(size.inner, size.width)
        self.output_norm = nn.LayerNorm(size.width, NORM_EPS)
        self.attention_dropout, self.output_dropout = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(self.attention_dropout(self.attention_output(self.attention(x))) + x)
        return self.output_norm(self.output_dropout(self.output(F.gelu(self.inner(x)))) + x)


class Encoder(nn.Module):
    """(batch, length) token and segment numbers -> (batch, width), the first token's state through the pooler."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embeddings = Embeddings(size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.pooler = nn.Linear(size.width, size.width)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        x = self.embeddings(tokens, segments)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.pooler(x[:, 0]))


class Classifier(nn.Module):
    """Classifies sentences: the encoder, named `base_model` as in transformers, and a fresh head."""

    def __init__(self, size: Size, classes: int = 2) -> None:
        super().__init__()
        self.base_model = Encoder(size)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(size.width, classes)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        return self.head(self.dropout(self.base_model(tokens, segments)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def rte_like_batch(device: str, size: int = 32, length: int = 128) -> dict[str, Tensor]:
    """Random sentence pairs of full length, as in the paper's RTE batches: forward's arguments, (size, length) each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    segments = (torch.arange(length) >= length // 2).long().expand(size, -1).contiguous()
    return {"tokens": tokens.to(device), "segments": segments.to(device)}
