"""Parameter shapes of real models, computed from a few numbers: what benchmarks and profiles run over."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass

#: Name of a parameter to its shape, in the model's order.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix a language model's parameters, under the names of transformers.

    vocab, hidden, intermediate, layers, heads, kv_heads: sizes; the heads divide ``hidden`` and ``kv_heads`` of them
        have keys and values of their own.
    tied: whether the output matrix is the embedding.
    positions: how many positions are learned; with any, the model is GPT-2's kind: biases, LayerNorm, one matrix for
        queries, keys and values, and matrices that are stored as (inputs, outputs).
    experts: of each feed-forward layer, whose matrices are then stacked into parameters of three dimensions; 0: none.
    experts_per_token: how many of them see a token.
    normed_heads: whether queries and keys are normalized for each head, as in Qwen3.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    positions: int = 0
    experts: int = 0
    experts_per_token: int = 0
    normed_heads: bool = False

    def shapes(self, layers: int | None = None) -> Shapes:
        """Return every parameter's shape, with only the first ``layers`` layers if given.

        Raises ValueError if the model does not have that many, or for none.
        """
        if layers is not None and not 1 <= layers <= self.layers:
            raise ValueError(f"layers is {layers}; this model allows 1 to {self.layers}")
        kind = self._gpt2 if self.positions else self._llama
        return dict(kind(self.layers if layers is None else layers))

    def _llama(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        h, i, e = self.hidden, self.intermediate, self.experts
        kv = h // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, h)
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj.weight", (h, h)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, h)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, h)
            yield f"{prefix}.self_attn.o_proj.weight", (h, h)
            if self.normed_heads:
                yield f"{prefix}.self_attn.q_norm.weight", (h // self.heads,)
                yield f"{prefix}.self_attn.k_norm.weight", (h // self.heads,)
            if e:
                yield f"{prefix}.mlp.gate.weight", (e, h)
                yield f"{prefix}.mlp.experts.gate_up_proj", (e, 2 * i, h)
                yield f"{prefix}.mlp.experts.down_proj", (e, h, i)
            else:
                yield f"{prefix}.mlp.gate_proj.weight", (i, h)
                yield f"{prefix}.mlp.up_proj.weight", (i, h)
                yield f"{prefix}.mlp.down_proj.weight", (h, i)
            yield f"{prefix}.input_layernorm.weight", (h,)
            yield f"{prefix}.post_attention_layernorm.weight", (h,)
        yield "model.norm.weight", (h,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)

    def _gpt2(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        h, i = self.hidden, self.intermediate
        yield "transformer.wte.weight", (self.vocab, h)
        yield "transformer.wpe.weight", (self.positions, h)
        for layer in range(layers):
            prefix = f"transformer.h.{layer}"
            yield from _weight_and_bias(f"{prefix}.ln_1", h)
            yield from _weight_and_bias(f"{prefix}.attn.c_attn", h, 3 * h)
            yield from _weight_and_bias(f"{prefix}.attn.c_proj", h, h)
            yield from _weight_and_bias(f"{prefix}.ln_2", h)
            yield from _weight_and_bias(f"{prefix}.mlp.c_fc", h, i)
            yield from _weight_and_bias(f"{prefix}.mlp.c_proj", i, h)
        yield from _weight_and_bias("transformer.ln_f", h)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, h)


#: By name. The Llamas of 60M to 1B are those that papers on low-memory optimizers pretrain, from GaLore on.
MODELS: dict[str, Architecture] = {
    "gpt2": Architecture(50257, 768, 3072, 12, 12, 12, tied=True, positions=1024),
    "gpt2-xl": Architecture(50257, 1600, 6400, 48, 25, 25, tied=True, positions=1024),
    "llama-60m": Architecture(32000, 512, 1376, 8, 8, 8),
    "llama-350m": Architecture(32000, 1024, 2736, 24, 16, 16),
    "llama-1b": Architecture(32000, 2048, 5461, 24, 32, 32),
    "llama-7b": Architecture(32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": Architecture(128256, 4096, 14336, 32, 32, 8),
    "qwen3-8b": Architecture(151936, 4096, 12288, 36, 32, 8, normed_heads=True),
    "mixtral-8x7b": Architecture(32000, 4096, 14336, 32, 32, 8, experts=8, experts_per_token=2),
}


def model_shapes(name: str, layers: int | None = None) -> Shapes:
    """Return the shapes of a model's parameters by name, with only its first ``layers`` layers if given.

    Raises ValueError, with near names, for a model that is not in `MODELS`, and for layers that it does not have.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS)
        raise ValueError(
            f"model is {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(MODELS)}")
        )
    return MODELS[name].shapes(layers)


def parameter_count(shapes: Shapes) -> int:
    """Return how many elements parameters of these shapes have together."""
    return sum(math.prod(shape) for shape in shapes.values())


def _weight_and_bias(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A weight and a bias of the weight's last dimension."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[-1:]
