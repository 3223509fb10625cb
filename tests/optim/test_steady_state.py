"""What a step costs the host when nothing but gradients is new, and that a step notices whatever else is."""

import gc
import weakref

import pytest
import torch

from lowmem_kernels.testing.fake_driver import fake_driver
from lowmem_optim import CAME, SWAN, Adafactor, AdaLomo, AdamMini, AdamW, AdaPM, Lomo, SinkGD, TorchAdafactor
from optim.calls import calls_in

OPTIMIZERS = {
    "AdamW": lambda p, **o: AdamW(p, lr=1e-2, **o),
    "Lomo": lambda p, **o: Lomo(p, lr=1e-2, **o),
    "Adafactor": lambda p, **o: Adafactor(p, **o),
    "TorchAdafactor": lambda p, **o: TorchAdafactor(p, lr=1e-2, **o),
    "AdaLomo": lambda p, **o: AdaLomo(p, lr=1e-2, **o),
    "CAME": lambda p, **o: CAME(p, lr=1e-2, **o),
    "SinkGD": lambda p, **o: SinkGD(p, lr=1e-2, scale=0.5, **o),
    "SWAN": lambda p, **o: SWAN(p, lr=1e-2, scale=0.5, **o),
    "AdaPM": lambda p, **o: AdaPM(p, lr=1e-2, rank=2, policy="lowrank", **o),
    "AdamMini": lambda p, **o: AdamMini(p, lr=1e-2, **o),
}
#: those whose matrices have no state, and those with a rule for matrices and another for vectors
ROUTED = (OPTIMIZERS["SinkGD"], OPTIMIZERS["SWAN"])
WITH_TWO_RULES = (*ROUTED, OPTIMIZERS["AdaPM"])
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def make_params(count=4):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 72) if i % 3 else torch.randn(72)) for i in range(count)]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def trained(make, change, steps=4, **options):
    """Parameters after some steps, before the third of which ``change`` is called with optimizer and parameters."""
    params = make_params()
    optimizer = make(params, **options)
    for i in range(steps):
        set_gradients(params, i)
        if i == 2:
            optimizer = change(optimizer, params) or optimizer
        optimizer.step()
    return [param.detach() for param in params]


def forget(optimizer, params):
    optimizer._known = None


def without_gradient(optimizer, params):
    params[1].grad = None


def other_memory(optimizer, params):
    params[1].data = params[1].data.clone() + 1
    params[2].data = params[2].data.clone(memory_format=torch.contiguous_format)


def other_state(optimizer, params):
    """A new dictionary with new tensors, as some checkpoint code makes."""
    optimizer.state[params[1]] = {
        key: value + 1 if isinstance(value, torch.Tensor) else value
        for key, value in optimizer.state[params[1]].items()
    }


def other_tensors_in_state(optimizer, params):
    state = optimizer.state[params[1]]
    state.update({key: value + 1 for key, value in state.items() if isinstance(value, torch.Tensor)})


def other_memory_in_state(optimizer, params):
    """As code does that moves state to the host and back."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.data = value.data + 1


def no_state(optimizer, params):
    optimizer.state.clear()


def other_options(optimizer, params):
    optimizer.param_groups[0].update(lr=0.5, maximize=True, skip_nonfinite="step", seed=7)


def another_group(optimizer, params):
    del optimizer.param_groups[0]["params"][3]
    optimizer.add_param_group({"params": [params[3]], "weight_decay": 0.5})


def other_order(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def strided_gradient(optimizer, params):
    params[1].grad = params[1].grad.t().contiguous().t()


def loaded(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES = [
    without_gradient, other_memory, other_state, other_tensors_in_state, other_memory_in_state, no_state, other_options,
    another_group,
    other_order, strided_gradient, loaded,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@every_optimizer
def test_a_step_notices_what_has_changed(make, change):
    """The same as an optimizer that has forgotten, right after the change, all that it knew."""

    def and_forget(optimizer, params):
        change(optimizer, params)
        forget(optimizer, params)

    kept = trained(make, change)
    assert all(map(torch.equal, kept, trained(make, and_forget)))
    # a change that changes nothing would show nothing; without rounding noise Lomo has no state that matters
    same = [loaded, other_order, strided_gradient]
    if make is OPTIMIZERS["Lomo"]:
        same += [other_state, other_tensors_in_state, other_memory_in_state, no_state]
    # nor has a matrix of these
    if make in ROUTED:
        same += [other_state, other_tensors_in_state]
    # and a library may add up products in another order where strides are others
    if make is OPTIMIZERS["SWAN"] and change is strided_gradient:
        return
    unchanged = trained(make, lambda optimizer, params: None)
    assert all(map(torch.equal, kept, unchanged)) == (change in same)


@every_optimizer
def test_a_gradient_that_was_given_another_shape_is_refused(make):
    params = make_params()
    optimizer = make(params)
    for seed in range(2):
        set_gradients(params, seed)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    params[2].grad.data = torch.zeros(2, 72)
    with pytest.raises(ValueError, match=r"grads\[\d\] has shape \(2, 72\); allowed: \(3, 72\)"):
        optimizer.step()
    # where there is another rule for vectors, those have been updated before
    matrices_only = make in WITH_TWO_RULES
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True) if a.ndim == 2 or not matrices_only)


def test_what_remembers_does_not_keep_gradients_or_parameters_alive():
    params = make_params()
    optimizer = AdaLomo(params, lr=1e-2)
    set_gradients(params, 0)
    gradients = [weakref.ref(param.grad) for param in params]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in gradients)
    states = [
        weakref.ref(t) for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
    ]
    gc.disable()
    try:
        del optimizer
        assert not any(ref() is not None for ref in states)
    finally:
        gc.enable()


@every_optimizer
def test_python_calls_nothing_for_each_parameter(make):
    """What has to be looked up of each is, in loops in C; also where gradients are in new places. And one launch.

    For each rule, that is: SinkGD has one for matrices and one for vectors; SWAN has four and products for matrices,
    AdaPM six.
    """
    launches_of_a_step = {OPTIMIZERS["SinkGD"]: 2, OPTIMIZERS["SWAN"]: 5, OPTIMIZERS["AdaPM"]: 7}.get(make, 1)
    counts = {}
    with fake_driver() as gpu:
        for count in (6, 60, 291):
            params = make_params(count)
            optimizer = make(params, backend="triton")
            for i in range(2):
                set_gradients(params, i)
                optimizer.step()
            # new gradients in memory of their own
            old = [param.grad for param in params]
            set_gradients(params, 2)
            launches = gpu.count_launches()
            counts[count] = calls_in(optimizer.step)
            assert gpu.count_launches() == launches + launches_of_a_step
            del old
    assert counts[291] == counts[60] == counts[6]
