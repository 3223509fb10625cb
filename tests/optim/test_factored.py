"""What the factored optimizers hand to their verb: everything in one call, and RMS(p) carried from step to step."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lowmem_optim import CAME, Adafactor, AdaLomo, TorchAdafactor, came, factored
from optim.tensors import make_params, set_gradients

NAMES = ("scalar", "vector", "matrix", "experts", "empty")
scaled = pytest.mark.parametrize("optimizer", [Adafactor, AdaLomo, TorchAdafactor])


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of a verb. The stand-in does as kernels do: writes parameters and their sums."""
    seen = []

    def verb(params, *lists, param_sums=None, **options):
        before = None if param_sums is None else [s.item() for s in param_sums]
        seen.append({"params": list(params), "lists": lists, "sums": before, "tensors": param_sums, **options})
        for i, param in enumerate(params):
            param.mul_(0.5)
            if param_sums is not None:
                param_sums[i].copy_(param.float().square().sum())

    monkeypatch.setattr(factored, "factored_update_", verb)
    monkeypatch.setattr(came, "confidence_update_", verb)
    return seen


def step(optimizer, params):
    set_gradients(params, 0)
    optimizer.step()


def sums_of(params):
    return [p.detach().float().square().sum().item() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [Adafactor, AdaLomo, TorchAdafactor, CAME])
def test_vectors_and_matrices_go_in_one_call(calls, optimizer, dtype):
    params = make_params(dtype, NAMES)
    step(optimizer(params), params)
    assert [call["params"] for call in calls] == [params]


def test_momenta_of_two_dtypes_go_in_two_calls(calls):
    """As after loading a checkpoint for some parameters: a launch knows one dtype of state."""
    params = make_params(torch.bfloat16, NAMES)
    optimizer = Adafactor(params, beta1=0.9, state_dtype="param")
    optimizer.init_state()
    for param in params[1:3]:
        optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].float()
    step(optimizer, params)
    assert [call["params"] for call in calls] == [[params[0], *params[3:]], params[1:3]]


@scaled
def test_sums_are_those_that_the_last_step_left(calls, optimizer):
    params = make_params(names=NAMES)
    optimizer = optimizer(params)
    step(optimizer, params)
    assert torch.tensor(calls[0]["sums"]).isnan().all()
    for _ in range(2):
        expected = sums_of(params)
        step(optimizer, params)
        assert calls[-1]["sums"] == expected
    # in the steady state nothing is allocated, so that tables of addresses stay what they are
    addresses = [[s.data_ptr() for s in call["tensors"]] for call in calls]
    assert addresses[0] == addresses[1] == addresses[2]


def written_in_place(param):
    with torch.no_grad():
        param.add_(1.0)


def given_other_memory(param):
    param.data = param.data.clone()


def given_another_dtype(param):
    param.data = param.data.bfloat16()
    param.grad = None


def loaded(param):
    nn.ParameterList([param]).load_state_dict({"0": torch.ones_like(param)})


@pytest.mark.parametrize("write", [written_in_place, given_other_memory, given_another_dtype, loaded])
@scaled
def test_a_parameter_that_others_wrote_has_no_known_sum(calls, optimizer, write):
    params = make_params(names=NAMES)
    optimizer = optimizer(params)
    for _ in range(2):
        step(optimizer, params)
    write(params[2])
    expected = sums_of(params)
    calls.clear()
    step(optimizer, params)
    known = {id(p): s for call in calls for p, s in zip(call["params"], call["sums"], strict=True)}
    assert math.isnan(known.pop(id(params[2])))
    assert list(known.values()) == expected[:2] + expected[3:]
    expected = sums_of(params)
    calls.clear()
    step(optimizer, params)
    assert {id(p): s for call in calls for p, s in zip(call["params"], call["sums"], strict=True)} == {
        id(p): s for p, s in zip(params, expected, strict=True)
    }


def test_a_parameter_without_gradient_keeps_its_sum(calls):
    params = make_params(names=NAMES)
    optimizer = AdaLomo(params)
    step(optimizer, params)
    expected = sums_of(params)
    params[1].grad = None
    optimizer.step()
    step(optimizer, params)
    assert calls[-1]["sums"][1] == expected[1]


def test_a_step_that_failed_leaves_no_sums(calls, monkeypatch):
    params = make_params(names=NAMES)
    optimizer = AdaLomo(params)
    step(optimizer, params)
    verb = factored.factored_update_

    def fails(*args, **kwargs):
        verb(*args, **kwargs)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(factored, "factored_update_", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(optimizer, params)
    step(optimizer, params)
    assert torch.tensor(calls[-1]["sums"]).isnan().all()


def copied(params, optimizer):
    return copy.deepcopy((params, optimizer))


def pickled(params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


def resumed(params, optimizer):
    checkpoint = optimizer.state_dict()
    assert {key for state in checkpoint["state"].values() for key in state} <= {
        "step", "uid", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col",
    }  # fmt: skip
    optimizer.load_state_dict(checkpoint)
    return params, optimizer


@pytest.mark.parametrize("again", [copied, pickled, resumed])
@scaled
def test_sums_are_not_part_of_copies_and_checkpoints(calls, optimizer, again):
    params = make_params(names=NAMES)
    optimizer = optimizer(params)
    step(optimizer, params)
    params, optimizer = again(params, optimizer)
    step(optimizer, params)
    assert torch.tensor(calls[-1]["sums"]).isnan().all()
    step(optimizer, params)
    assert not torch.tensor(calls[-1]["sums"]).isnan().any()


@pytest.mark.parametrize(
    "options", [{"scale_parameter": False}, {"capturable": True}], ids=lambda options: next(iter(options))
)
def test_sums_are_carried_only_where_they_are_needed_and_safe(calls, options):
    """A captured graph is replayed without the Python code that sees a parameter change."""
    params = make_params(names=NAMES)
    step(Adafactor(params, **options), params)
    assert calls[0]["sums"] is None
