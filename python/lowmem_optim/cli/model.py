"""A small Llama-style language model over bytes, the task that `lowmem train` compares optimizers on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte
HEAD_WIDTH = 32
ROPE_BASE = 10_000.0
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model: `dim` is split evenly over `heads`; `hidden` is SwiGLU's width; `context` is in tokens."""

    layers: int
    dim: int
    heads: int
    hidden: int
    context: int

    @classmethod
    def from_width(cls, layers: int, dim: int, context: int) -> "ModelConfig":
        """Llama's proportions for a width: 32-wide heads, SwiGLU 8/3 as wide as the model. Raises ValueError."""
        if dim % HEAD_WIDTH:
            below = dim // HEAD_WIDTH * HEAD_WIDTH
            nearest = " or ".join(str(d) for d in (below, below + HEAD_WIDTH) if d)
            raise ValueError(f"{dim} is not a multiple of {HEAD_WIDTH}, the width of one attention head; try {nearest}")
        # SwiGLU has three matrices where a plain MLP has two: 8/3 keeps the parameters of a 4 * dim MLP
        hidden = round(8 / 3 * dim / HEAD_WIDTH) * HEAD_WIDTH
        return cls(layers=layers, dim=dim, heads=dim // HEAD_WIDTH, hidden=hidden, context=context)

    @property
    def parameters(self) -> int:
        """Number of parameters of a model of this shape."""
        attention = 4 * self.dim * self.dim
        mlp = 3 * self.dim * self.hidden
        norms = 2 * self.dim
        return self.layers * (attention + mlp + norms) + self.dim + 2 * VOCABULARY * self.dim


def rope_table(context: int, width: int) -> Tensor:
    """Cosines and sines, (2, context, width // 2), of the rotations that encode positions 0 to context - 1."""
    frequencies = ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + width / 2]) by its position's angle; x is (..., context, width)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Maps (batch, context, dim) to the same shape."""
        batch, context, dim = x.shape
        qkv = self.qkv(x).view(batch, context, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, rope), rotate(key, rope), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, context, dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: out(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to the same shape."""
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Maps (batch, context, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """Predicts the next byte from up to `config.context` bytes before it."""

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        # cosines rather than angles: a cast to bfloat16 would be off by up to a quarter radian at position 100
        self.register_buffer("rope", rope_table(config.context, config.dim // config.heads), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        # each block adds two terms to the residual stream; this keeps their sum's variance independent of depth
        for module in self.modules():
            if isinstance(module, Attention | SwiGLU):
                nn.init.normal_(module.out.weight, std=INIT_STD / (2 * self.config.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, 256) for bytes (batch, length); length is at most the context."""
        rope = self.rope[:, : tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return loss_of(self, tokens, targets)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a model, which may be in a wrapper, in nats per byte."""
    # float32: a bfloat16 logarithm of a sum over 256 bytes would be coarser than the differences to be compared
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
