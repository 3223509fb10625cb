"""Parameters of every shape and layout, their gradients, and comparison by bits."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


#: name: a function of a seed that returns float32 values in the layout of the name
LAYOUTS = {
    "scalar": lambda seed: 1.5 + 0.1 * values(seed=seed),
    "vector": lambda seed: values(37, seed=seed),
    "matrix": lambda seed: values(12, 20, seed=seed),
    "one_row": lambda seed: values(1, 33, seed=seed),
    "one_column": lambda seed: values(33, 1, seed=seed),
    "conv_channels_last": lambda seed: values(6, 4, 3, 3, seed=seed).contiguous(memory_format=torch.channels_last),
    "experts": lambda seed: values(3, 8, 10, seed=seed),
    "transposed": lambda seed: values(9, 14, seed=seed).T,
    "strided": lambda seed: values(8, 22, seed=seed)[:, ::2],
    "empty": lambda seed: values(0, 5, seed=seed),
}
SMALL = ("vector", "matrix", "transposed")


def make_params(dtype=torch.float32, names=tuple(LAYOUTS), seed=0) -> list[nn.Parameter]:
    """One parameter for each layout; the same arguments give the same bits."""
    return list(make_named_params(dtype, names, seed).values())


def make_named_params(dtype=torch.float32, names=tuple(LAYOUTS), seed=0) -> dict[str, nn.Parameter]:
    """As `make_params`, by name; a parameter's bits do not depend on which others are asked for."""
    position = {name: i for i, name in enumerate(LAYOUTS)}
    return {name: nn.Parameter(LAYOUTS[name](100 * seed + position[name]).to(dtype)) for name in names}


def gradient(param: Tensor, step: int, index: int = 0) -> Tensor:
    """A contiguous gradient, whatever the parameter's strides, whose size and sign vary from step to step."""
    size = (0.2, 1.0, 3.0)[step % 3]
    mean = 0.5 if index % 2 else -0.2
    noise = values(*param.shape, seed=1 + 1000 * step + index)
    return (size * (noise + mean)).to(param.dtype)


def set_gradients(params, step: int) -> None:
    """Give every parameter the gradient of a step; one in three matrices gets an expanded one, as sum() makes."""
    for index, param in enumerate(params):
        grad = gradient(param, step, index)
        if param.ndim == 2 and (step + index) % 3 == 0:
            grad = grad[:1].expand(param.shape)
        param.grad = grad


def take_steps(optimizer, params, count: int, first: int = 0) -> None:
    """Steps ``first .. first + count - 1`` of the run that `set_gradients` describes."""
    for step in range(first, first + count):
        set_gradients(params, step)
        optimizer.step()


def trained(case, dtype=torch.float32, steps=4, names=SMALL, **options):
    """(parameters, optimizer) of a run under way."""
    params = make_params(dtype, names)
    optimizer = case.make(params, **options)
    take_steps(optimizer, params, steps)
    return params, optimizer


def to_numpy(tensors) -> list[np.ndarray]:
    return [t.detach().double().numpy() for t in tensors]


def copies(tensors) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal dtype, shape and bits: -0.0 is not 0.0, and a NaN equals itself."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    integer = INTEGERS[actual.element_size()]
    return _bits(actual, integer) == _bits(expected, integer)


def _bits(tensor: Tensor, integer: torch.dtype) -> bytes:
    return tensor.detach().contiguous().view(integer).numpy().tobytes()


def assert_same_bits(actual, expected) -> None:
    """Lists of tensors with the same bits."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, b), f"tensor {i} differs:\n{a}\n{b}"


def states_of(optimizer, params) -> list[dict]:
    """Copies of the states in the order of the parameters; {} for one that has none."""
    return [copy.deepcopy(optimizer.state[p]) if p in optimizer.state else {} for p in params]


def assert_same_states(actual: list[dict], expected: list[dict]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_values(a, b, f"state {i}")


def assert_same_values(actual, expected, where="") -> None:
    """Equal by type, and tensors by bits, through dictionaries, lists and tuples."""
    assert type(actual) is type(expected), f"{where}: {actual!r} and {expected!r}"
    if isinstance(actual, dict):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} and {list(expected)}"
        for key in actual:
            assert_same_values(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_values(a, b, f"{where}[{i}]")
    elif isinstance(actual, Tensor):
        assert same_bits(actual, expected), f"{where} differs:\n{actual}\n{expected}"
    else:
        assert actual == expected, f"{where}: {actual!r} and {expected!r}"


class Unchanged:
    """A context that fails unless parameters, states and groups have the same bits when it is left."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def everything(self):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        params = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        ids = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        states = [(id(param), state) for param, state in self.optimizer.state.items()]
        return copy.deepcopy({"groups": groups, "params": params, "ids": ids, "states": states})

    def __enter__(self):
        self.before = self.everything()

    def __exit__(self, error_type, error, traceback):
        if error_type is None:
            assert_same_values(self.everything(), self.before)
