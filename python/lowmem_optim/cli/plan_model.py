"""The model of `lowmem plan`: any MODEL as modules on the meta device, which have shapes and take no memory."""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_kernels.testing.models import MODELS, Architecture, Shapes, model_shapes
from lowmem_optim.naming import importing_from_here, line_of, load_named

KINDS = "a config.json of transformers, a folder that has one, or module:callable"


@dataclass(frozen=True)
class Sizes:
    """What the activations of a transformer depend on.

    queries, keys: widths of all heads together.
    intermediate: inner width of a feed-forward layer, of one expert where there are some.
    gated: whether it is down(act(gate(x)) * up(x)).
    experts: those that see a token; 0: one feed-forward layer, which all see.
    normed_heads: whether queries and keys are normalized for each head.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocab: int
    gated: bool
    experts: int = 0
    normed_heads: bool = False


@dataclass(frozen=True)
class Model:
    """A model on the meta device, and its sizes, None where nothing tells them."""

    name: str
    module: nn.Module
    sizes: Sizes | None


def load_model(name: str, dtype: torch.dtype) -> Model:
    """Returns the model that a name of `lowmem_kernels.testing.models`, a path or module:callable stands for.

    Nothing is read but configurations, and nothing from a network. Raises ValueError for what is none of these.
    """
    path, known = Path(name), name.lower()
    if known in MODELS:
        architecture = MODELS[known]
        module: nn.Module = module_of(model_shapes(known))
        sizes: Sizes | None = sizes_of(architecture)
    elif path.exists():
        module, sizes = _from_config(path)
    elif ":" in name:
        module = _from_callable(name)
        sizes = _sizes_of_config(getattr(module, "config", None), module)
    else:
        last = known.rpartition("/")[-1]
        near = [model for model in MODELS if last in model] or difflib.get_close_matches(last, MODELS)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"model is {name!r}; {hint}allowed: {', '.join(MODELS)}, {KINDS}")
    module = module.to("meta", dtype)
    if not any(param.requires_grad for param in module.parameters()):
        raise ValueError(f"model is {name!r}, which has no parameters to train; allowed: one that has")
    return Model(name, module, sizes)


class Conv1D(nn.Module):
    """As that of transformers: a linear layer whose weight is stored as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, device: str) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device))


def module_of(shapes: Shapes, device: str = "meta") -> nn.Module:
    """Returns modules with parameters of these names and shapes, of the types that `split_params` tells roles by."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path[:-1]:
            parent = _child(parent, part)
        if last == "weight":
            layer = _layer(path[-1], shape, ".".join((*path, "bias")) in shapes, device)
            parent.add_module(path[-1], layer)
        elif last != "bias":  # experts, whose module has nothing else
            experts = nn.Parameter(torch.empty(shape, device=device))
            _child(parent, path[-1]).register_parameter(last, experts)
    return root


def _child(parent: nn.Module, name: str) -> nn.Module:
    if not hasattr(parent, name):
        parent.add_module(name, nn.Module())
    child: nn.Module = getattr(parent, name)
    return child


def _layer(name: str, shape: tuple[int, ...], bias: bool, device: str) -> nn.Module:
    if len(shape) == 1:
        return (nn.LayerNorm if bias else nn.RMSNorm)(shape, device=device)
    if name in ("embed_tokens", "wte", "wpe"):
        return nn.Embedding(shape[0], shape[1], device=device)
    return Conv1D(shape[0], shape[1], device) if bias else nn.Linear(shape[1], shape[0], bias=False, device=device)


def sizes_of(a: Architecture) -> Sizes:
    """Returns the sizes of a model by name."""
    keys = a.hidden // a.heads * a.kv_heads
    gated = not a.positions
    return Sizes(
        a.layers, a.hidden, a.hidden, keys, a.intermediate, a.vocab, gated, a.experts_per_token, a.normed_heads
    )


def _from_config(path: Path) -> tuple[nn.Module, Sizes | None]:
    """The model of a configuration of transformers, with weights that nobody has drawn."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"the folder {path} has no config.json; allowed: {KINDS}")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} as JSON: {error}") from error
    if not isinstance(described, dict) or "model_type" not in described:
        raise ValueError(f"{file} has no 'model_type'; allowed: a config.json of transformers")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{file} needs transformers: pip install 'lowmem-kernels[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent if path.is_dir() else file, local_files_only=True)
        with torch.device("meta"):
            module = _make(transformers, config)
    except Exception as error:  # what a configuration may lack, each model of transformers says in its own way
        raise ValueError(f"transformers cannot build a model from {file}: {line_of(error)}") from error
    return module, _sizes_of_config(config, module)


def _make(transformers: Any, config: Any) -> nn.Module:
    """The class that the configuration names, else a causal language model, else whatever there is."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            module: nn.Module = getattr(transformers, name)(config)
            return module
    try:
        module = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        module = transformers.AutoModel.from_config(config)
    return module


def _sizes_of_config(config: Any, module: nn.Module) -> Sizes | None:
    """Sizes by the names that transformers' configurations of transformers with one stack have."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    get: Callable[..., Any] = lambda *names: next((v for n in names if (v := getattr(config, n, None))), None)  # noqa: E731
    hidden, layers, heads, vocab = (
        get("hidden_size", "n_embd"),
        get("num_hidden_layers", "n_layer"),
        get("num_attention_heads", "n_head"),
        get("vocab_size"),
    )
    if not all(isinstance(size, int) for size in (hidden, layers, heads, vocab)) or get("is_encoder_decoder"):
        return None
    width = get("head_dim") or hidden // heads
    experts = get("num_experts_per_tok") or 0
    inner = (get("moe_intermediate_size") if experts else None) or get("intermediate_size", "n_inner") or 4 * hidden
    names = [name for name, _ in module.named_parameters()]
    gated = any("gate_proj" in name or "gate_up" in name for name in names)
    normed = any(name.endswith("q_norm.weight") for name in names)
    keys = width * (get("num_key_value_heads") or heads)
    return Sizes(layers, hidden, width * heads, keys, inner, vocab, gated, experts, normed)


def _from_callable(name: str) -> nn.Module:
    """What module:callable returns, called without arguments on the meta device."""
    make = load_named("model", name, "module:callable that can be imported")
    try:
        with importing_from_here(), torch.device("meta"):
            module = make()
    except Exception as error:  # anything that somebody else's code raises
        raise ValueError(f"{name}() on the meta device: {line_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name}() returned a {type(module).__name__}; allowed: a torch.nn.Module")
    return module
