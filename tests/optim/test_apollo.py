"""What is said of APOLLO beyond its oracle's 50 steps: redraws, limits, memory, and which projections are whose."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from lowmem_kernels.numerics import FP32_EPS
from lowmem_kernels.testing.models import model_shapes
from lowmem_kernels.testing.oracles.projection import DEFAULTS, MINI, stack
from lowmem_optim import APOLLO, APOLLOMini
from optim.tensors import assert_same_bits, assert_same_states, states_of, to_numpy

SHAPES = {"tall": (96, 40), "square": (64, 64), "wide": (40, 96)}
STEPS = 300


def gradients(shape, steps, seed=0):
    """Of a size that varies by a factor of ten, with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mean = 0.3 * torch.randn(shape, generator=generator)
    for _ in range(steps):
        size = torch.randn((), generator=generator).exp()
        yield size * (mean + torch.randn(shape, generator=generator))


def train(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()


def make(shape=(24, 16), cls=APOLLO, **options):
    param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    return param, cls([param], **{"rank": 4, **options} if cls is APOLLO else options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (APOLLO, dict(rank=8, weight_decay=0.1)),
        (APOLLO, dict(rank=8, scale=32.0, disable_nl=True)),
        (APOLLOMini, dict(weight_decay=0.1)),
    ],
    ids=["channel", "channel-unlimited", "tensor"],
)
def test_300_steps_with_redraws(shape, cls, options):
    """As the oracle in float64, to 1e-5 of the way: a scale is a ratio of norms, off by some units in each step."""
    options = {"lr": 1e-2, "update_proj_gap": 50, **options}
    param, optimizer = make(shape, cls, **options)
    start, grads = param.detach().double(), list(gradients(shape, STEPS))
    train(optimizer, param, grads)
    defaults = {**DEFAULTS, **(MINI if cls is APOLLOMini else {}), "stacks": None}
    for scale_front in (False, True):
        # where the root of the scale is applied, before the limit or after it, makes no difference
        o = {**defaults, **options, "scale_front": scale_front}
        end, state = stack(start.numpy(), to_numpy(grads), [o] * STEPS)
        end = torch.from_numpy(np.ascontiguousarray(end))
        allowed = 1e-5 * (end - start).norm() + 4 * FP32_EPS * STEPS**0.5 * end.norm()
        assert (param.detach().double() - end).norm() <= allowed
        assert state["epoch"] == optimizer.state[param]["epoch"] == 6


def test_a_gradient_of_zeros_does_not_stop_training():
    """With the norm 0 as the last one, the next would be limited to 1e-8 and grow by 1 % a step from there."""
    for zero_at in (0, 5):
        param, optimizer = make(lr=1e-2)
        usual, other = make(lr=1e-2)
        grads = list(gradients(param.shape, 12))
        train(other, usual, grads)
        grads[zero_at] = torch.zeros_like(param)
        sizes = []
        for grad in grads:
            before = param.detach().clone()
            train(optimizer, param, [grad])
            sizes.append((param.detach() - before).norm().item())
        assert sizes[zero_at] == 0
        assert min(sizes[zero_at + 1 :]) > 0.2 * max(sizes)


def test_norms_grow_by_one_percent():
    param, optimizer = make(lr=1e-2)
    norms = []
    for k, grad in enumerate(gradients(param.shape, 30)):
        train(optimizer, param, [grad * (1 + k)])
        norms.append(optimizer.state[param]["update_norm"].item())
    growth = np.array(norms[1:]) / norms[:-1]
    assert growth.max() <= 1.01 * (1 + 1e-5)
    assert (growth > 1.0099).any()
    param, optimizer = make(lr=1e-2, disable_nl=True)
    train(optimizer, param, gradients(param.shape, 30))
    # of a limit no longer in force nothing is left
    optimizer.param_groups[0]["disable_nl"] = False
    train(optimizer, param, [1e-3 * torch.ones(param.shape)])
    assert torch.isfinite(optimizer.state[param]["update_norm"])


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (1, 9), (9, 1), (16, 16)])
def test_moments_are_never_larger_than_adams(shape):
    for rank in (1, 4, 15, 16, 256):
        param, optimizer = make(shape, rank=rank)
        optimizer.init_state()
        state = optimizer.state[param]
        assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == min(rank, min(shape)) * max(shape)


def test_projected_moments_are_projections():
    """With betas of 0, M is R: the gradient times what `projection` returns."""
    for shape in ((24, 16), (16, 24)):
        param, optimizer = make(shape, betas=(0.0, 0.0), update_proj_gap=2)
        for k, grad in enumerate(gradients(shape, 5)):
            train(optimizer, param, [grad])
            projection = optimizer.projection(param)
            assert projection.shape == (4, 16)
            expected = grad @ projection.T if shape[0] > shape[1] else projection @ grad
            torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-5, atol=1e-5)
            assert optimizer.state[param]["epoch"] == k // 2 + 1
    full, optimizer = make((24, 16), rank=16)
    train(optimizer, full, gradients((24, 16), 1))
    assert torch.equal(optimizer.projection(full), torch.eye(16))


def test_who_has_a_projection():
    param, optimizer = make()
    vector = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [vector]})
    vector.grad = torch.ones(3)
    optimizer.step()
    for wrong in (param, vector, torch.ones(2, 2)):
        with pytest.raises(ValueError, match="param has no projection; allowed: "):
            optimizer.projection(wrong)


def test_a_parameter_that_comes_later_gets_the_projection_in_force():
    """The clock is the group's, so that all its parameters share projections; a step counts a parameter's updates."""
    first, second = (nn.Parameter(torch.randn(24, 16)) for _ in range(2))
    optimizer = APOLLO([first, second], lr=1e-2, rank=4, update_proj_gap=4)
    start, grads = second.detach().double().numpy(), list(gradients((24, 16), 9))
    for k, grad in enumerate(grads):
        first.grad, second.grad = grad.clone(), (grad.clone() if k in (2, 3, 5, 8) else None)
        optimizer.step()
    taken = [2, 3, 5, 8]
    o = {**DEFAULTS, "lr": 1e-2, "rank": 4, "update_proj_gap": 4, "stacks": None}
    end, state = stack(start, to_numpy(grads[k] for k in taken), [o] * 4, steps=taken)
    np.testing.assert_allclose(to_numpy([second])[0], end, rtol=1e-5, atol=1e-7)
    assert (optimizer.state[second]["step"], optimizer.state[second]["epoch"]) == (4, 3)
    assert state["epoch"] == 3


def test_names_keep_projections_when_parameters_are_added():
    """At rank 1, where each has one of its own."""

    def projection_of(names):
        params = {name: nn.Parameter(torch.ones(6, 4)) for name in names}
        optimizer = APOLLOMini(params.items())
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer.projection(params["b"]), optimizer.projection(params[names[0]])

    alone, among = projection_of(["b"])[0], projection_of(["a", "b"])[0]
    assert torch.equal(alone, among)
    assert not torch.equal(*projection_of(["a", "b"]))


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini])
def test_resuming_across_a_redraw(cls):
    """Bit for bit, from a checkpoint that holds tensors and plain values only; the gap may change on the way."""
    grads = list(gradients((24, 16), 8))
    param, optimizer = make(cls=cls, update_proj_gap=3)
    train(optimizer, param, grads[:4])
    file = io.BytesIO()
    torch.save({"param": param.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = make(cls=cls, update_proj_gap=3)
    other.data.copy_(saved["param"])
    resumed.load_state_dict(saved["optimizer"])
    train(optimizer, param, grads[4:])
    train(resumed, other, grads[4:])
    assert_same_bits([other], [param])
    assert_same_states(states_of(resumed, [other]), states_of(optimizer, [param]))
    assert optimizer.state[param]["epoch"] == 3


def test_a_skipped_step_does_not_advance_the_clock():
    param, optimizer = make(skip_nonfinite="step", update_proj_gap=2)
    good = torch.ones_like(param)
    for grad, epoch, steps in ((good, 1, 1), (good * torch.nan, 1, 1), (good, 1, 2), (good, 2, 3)):
        train(optimizer, param, [grad])
        assert [int(optimizer.param_groups[0][name]) for name in ("epoch", "epoch_steps")] == [epoch, steps]


def test_bfloat16_moments_follow_a_variance_that_falls():
    """To nearest, 0.999 V is V, for good; with stochastic rounding it comes down as float32 does."""
    means = {}
    for dtype, rounding in (("fp32", True), ("param", True), ("param", False)):
        param = nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16))
        optimizer = APOLLO([param], rank=16, state_dtype=dtype, stochastic_rounding=rounding)
        generator = torch.Generator().manual_seed(0)
        for k in range(600):
            size = 1.0 if k < 100 else 0.1
            param.grad = (size * torch.randn(64, 32, generator=generator)).bfloat16()
            optimizer.step()
        means[dtype, rounding] = optimizer.state[param]["exp_avg_sq"].float().mean().item()
    # 1024 elements, each rounded 600 times by up to 0.4 %, upwards or downwards
    assert means["param", True] == pytest.approx(means["fp32", True], rel=0.02)
    assert means["param", False] > 1.2 * means["fp32", True]


def test_wrong_ranks_of_signs_and_clocks_of_torch():
    with pytest.raises(ValueError, match="rank is 4 and source is 'rademacher'; allowed: rank >= 8"):
        make(source="rademacher")
    with pytest.raises(ValueError, match="source is 'torch' and capturable is True; allowed: one of them"):
        make(source="torch", capturable=True)


def state_bytes(optimizer):
    """(of matrices, of all else) of an optimizer over tensors without memory."""
    optimizer.init_state()
    matrices = others = 0
    for state in optimizer.state.values():
        size = sum(t.numel() * t.itemsize for t in state.values() if isinstance(t, torch.Tensor) and t.ndim)
        if "update_norm" in state:
            matrices += size
        else:
            others += size
    return matrices, others


@pytest.mark.parametrize(
    ("cls", "options", "gigabytes"),
    [
        (APOLLO, {}, 3.238),
        (APOLLO, {"state_dtype": "param"}, 1.619),
        (APOLLOMini, {}, 0.0126),
        (APOLLOMini, {"state_dtype": "param"}, 0.0063),
    ],
    ids=["rank_256", "rank_256-bf16", "mini", "mini-bf16"],
)
def test_state_of_llama_7b(cls, options, gigabytes):
    """What docs/optimizers/apollo.md says: of matrices, and of the embedding, the head and norms in AdamW's hands."""
    named = {
        name: nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for name, shape in model_shapes("llama-7b").items()
    }
    tables = [(name, param) for name, param in named.items() if max(param.shape) == 32000]
    rest = [(name, param) for name, param in named.items() if max(param.shape) < 32000]
    assert len(tables) == 2
    optimizer = cls([{"params": rest}, {"params": tables, "role": "embedding"}], **options)
    matrices, others = state_bytes(optimizer)
    assert matrices / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert others / 1e9 == pytest.approx(2.099, rel=0.01)
