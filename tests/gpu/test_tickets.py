"""One launch with waits has the bits of one launch for each phase, thousands of times: what no interpreter can show.

LOWMEM_TICKET_LAUNCHES says how many random launches there are (`make gpu-evidence` takes 10000).
"""

import os

import numpy as np
import pytest
import torch

from buckets import moved
from factored_buckets import NAMES, assert_same_buckets
from lowmem_kernels.factored import launch
from lowmem_kernels.testing import assert_same_bits
from lowmem_kernels.testing.models import model_shapes
from lowmem_optim import CAME, Adafactor, AdaLomo, TorchAdafactor
from lowmem_optim.cli.contenders import make_tensors, parameters
from random_tickets import NAMES_OF_DIALECTS, PHASED, random_bucket, random_order, restore

DEVICE = torch.device("cuda")
LAUNCHES = int(os.environ.get("LOWMEM_TICKET_LAUNCHES", "800"))
#: Random orders of each list, and steps of each order.
ORDERS, STEPS = 20, 2
OPTIMIZERS = {
    "Adafactor": lambda params, **options: Adafactor(params, **options),
    "TorchAdafactor": lambda params, **options: TorchAdafactor(params, lr=1e-2, **options),
    "AdaLomo": lambda params, **options: AdaLomo(params, lr=1e-2, **options),
    "CAME": lambda params, **options: CAME(params, lr=1e-3, **options),
}
every_dialect = pytest.mark.parametrize("dialect", NAMES_OF_DIALECTS)
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def on_gpu(chosen):
    bucket = chosen.make()
    for name in NAMES:
        setattr(bucket, name, [t if t is None else moved(t, DEVICE) for t in getattr(bucket, name)])
    return bucket


def generator(*seed):
    return np.random.default_rng(seed)


def random_size(random):
    """From a thousand elements to two million, all magnitudes alike."""
    return int(2 ** random.uniform(10, 21))


def check(bucket, expected, *what):
    try:
        assert_same_buckets(bucket, expected)
    except AssertionError as error:
        raise AssertionError(f"{error}, of {what}") from None


@every_dialect
def test_random_launches_have_the_bits_of_the_phased_form(dialect, monkeypatch):
    """The scratch is full of NaN before each launch (tests/conftest.py), and the counters are those of the last."""
    random = generator(1, NAMES_OF_DIALECTS.index(dialect))
    for _ in range(max(1, LAUNCHES // (len(NAMES_OF_DIALECTS) * ORDERS * STEPS))):
        chosen = random_bucket(random, dialect, random_size(random))
        start, phased, bucket = (on_gpu(chosen) for _ in range(3))
        chosen.run(phased, monkeypatch, PHASED, STEPS)
        for _ in range(ORDERS):
            order = random_order(random)
            restore(bucket, start)
            chosen.run(bucket, monkeypatch, order, STEPS)
            check(bucket, phased, chosen, order)


@every_dialect
def test_memory_that_was_full_of_nan(dialect, monkeypatch):
    """Launches back to back in memory of torch's allocator as it was left, with nothing between them that fills it."""
    monkeypatch.undo()  # conftest's filling of torch.empty
    random = generator(2, NAMES_OF_DIALECTS.index(dialect))
    for _ in range(3):
        chosen = random_bucket(random, dialect, random_size(random))
        phased, *buckets = (on_gpu(chosen) for _ in range(9))
        chosen.run(phased, monkeypatch, PHASED, STEPS)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        poison = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(7, 25) for _ in range(4)]
        del poison
        for bucket in buckets:
            chosen.run(bucket, monkeypatch, random_order(random), STEPS)
        for bucket in buckets:
            check(bucket, phased, chosen)


@every_dialect
def test_two_streams_at_once(dialect, monkeypatch):
    """Each stream has counters and tables of its own, and programs of both are on the device together."""
    random = generator(3, NAMES_OF_DIALECTS.index(dialect))
    others = [name for name in NAMES_OF_DIALECTS if name != dialect]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(4):
        lists = [random_bucket(random, name, random_size(random)) for name in (dialect, str(random.choice(others)))]
        phased = [on_gpu(chosen) for chosen in lists]
        buckets = [[on_gpu(chosen) for _ in range(10)] for chosen in lists]
        for chosen, bucket in zip(lists, phased, strict=True):
            chosen.run(bucket, monkeypatch, PHASED, STEPS)
        torch.cuda.synchronize()
        for pair in zip(*buckets, strict=True):
            for stream, chosen, bucket in zip(streams, lists, pair, strict=True):
                with torch.cuda.stream(stream):
                    chosen.run(bucket, monkeypatch, random_order(random), STEPS)
        torch.cuda.synchronize()
        for chosen, expected, runs in zip(lists, phased, buckets, strict=True):
            for bucket in runs:
                check(bucket, expected, chosen)


def trained(make, shapes, steps, **options):
    """Parameters with gradients that stay, and an optimizer that has taken steps."""
    params = parameters(*make_tensors(shapes, torch.bfloat16, DEVICE))
    optimizer = make(params, backend="triton", **options)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def assert_same_training(actual, expected, others):
    """Parameters have the same bits, and all tensors of the optimizers' states but those that only one of them has."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")
        states = [optimizer.state[p] for optimizer, p in zip(others, (a, b), strict=True)]
        for key in states[0].keys() & states[1].keys():
            if isinstance(states[0][key], torch.Tensor):
                assert_same_bits(states[0][key], states[1][key], f"{key} of parameter {i}")


SHAPES = {"matrix": (300, 520), "vector": (520,), "stack": (6, 24, 40), "ragged": (1030, 517), "tall": (4000, 24)}


@every_optimizer
def test_a_replayed_graph_of_several_steps_equals_eager_steps(make):
    """Two steps in a graph, replayed four times, after one that makes the state."""
    eager, usual = trained(make, SHAPES, 9)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured, optimizer = trained(make, SHAPES, 1, capturable=True)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            optimizer.step()
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_training(captured, eager, (optimizer, usual))


@every_optimizer
def test_a_layer_of_llama_7b(make, monkeypatch):
    """More programs than the device has places for, in the order that is planned for it, again and again."""
    shapes = {name: shape for name, shape in model_shapes("llama-7b", 1).items() if "layers" in name}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "plan_order", lambda facts: PHASED)
        expected, phased = trained(make, shapes, 20)
    for _ in range(3):
        params, optimizer = trained(make, shapes, 20)
        assert_same_training(params, expected, (optimizer, phased))
