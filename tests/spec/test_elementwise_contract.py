"""What the elementwise verbs promise besides numbers: messages, nothing written on errors, small temporaries."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from buckets import ADAMW, SCALED_UPDATE, SEED, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels import blocks as blocks_module
from lowmem_kernels.elementwise import adamw_, grad_stats, scaled_update_
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits

BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
THREE = [Case("a", (4, 6)), Case("b", (5,)), Case("c", ())]


def replaced(name, index, tensor):
    """A function that puts ``tensor(old)`` in a list of a bucket, or another list where index is None."""

    def change(bucket):
        column = getattr(bucket, name)
        if index is None:
            column[:] = tensor(column)
        else:
            column[index] = tensor(column[index])

    return change


double, half, bf16 = (lambda t: t.double()), (lambda t: t.half()), (lambda t: t.bfloat16())
meta = lambda t: t.to("meta")  # noqa: E731
shorter, longer, none = (lambda c: c[:-1]), (lambda c: [*c, c[0]]), (lambda c: [])

WRONG = {
    "grads_short": (replaced("grads", None, shorter), ValueError, r"grads has 2 entries; allowed: 3, one for each"),
    "grads_none": (replaced("grads", None, none), ValueError, r"grads has 0 entries; allowed: 3"),
    "params_long": (replaced("params", None, longer), ValueError, r"grads has 3 entries; allowed: 4"),
    "steps_long": (replaced("steps", None, longer), ValueError, r"steps has 4 entries; allowed: 3"),
    "param_float64": (replaced("params", 0, double), TypeError, r"params\[0\] is float64; allowed: float32, bfloat16"),
    "param_mixed": (
        replaced("params", 1, bf16),
        TypeError,
        r"params\[1\] is bfloat16; allowed: float32, as params\[0\]",
    ),
    "grad_mixed": (replaced("grads", 2, half), TypeError, r"grads\[2\] is float16; allowed: float32, as grads\[0\]"),
    "grad_device": (
        replaced("grads", 1, meta),
        ValueError,
        r"grads\[1\] is on meta; allowed: cpu, as the first",
    ),
    "grad_shape": (
        replaced("grads", 0, lambda t: t.t()),
        ValueError,
        r"grads\[0\] has shape \(6, 4\); allowed: \(4, 6\)",
    ),
    "step_dtype": (
        replaced("steps", 1, lambda t: t.long()),
        TypeError,
        r"steps\[1\] is int64; allowed: float32",
    ),
    "step_1d": (replaced("steps", 2, lambda t: t[None]), ValueError, r"steps\[2\] has shape \(1,\); allowed: \(\)"),
    "step_device": (replaced("steps", 0, meta), ValueError, r"steps\[0\] is on meta; allowed: cpu"),
}

WRONG_STATES = {
    "m_none": (replaced("exp_avgs", None, none), ValueError, r"exp_avgs has 0 entries; allowed: 3"),
    "v_none": (replaced("exp_avg_sqs", None, none), ValueError, r"exp_avg_sqs has 0 entries; allowed: 3"),
    "v_short": (replaced("exp_avg_sqs", None, shorter), ValueError, r"exp_avg_sqs has 2 entries; allowed: 3"),
    "m_half": (replaced("exp_avgs", 0, half), TypeError, r"exp_avgs\[0\] is float16; allowed: float32"),
    "m_bf16": (replaced("exp_avgs", 0, bf16), TypeError, r"exp_avgs\[0\] is bfloat16; allowed: float32"),
    "v_mixed": (replaced("exp_avg_sqs", 1, bf16), TypeError, r"exp_avg_sqs\[1\] is bfloat16; allowed: float32"),
    "m_shape": (
        replaced("exp_avgs", 1, lambda t: t[:4]),
        ValueError,
        r"exp_avgs\[1\] has shape \(4,\); allowed",
    ),
    "m_strided": (
        replaced("exp_avgs", 0, lambda t: t.t().contiguous().t()),
        ValueError,
        r"exp_avgs\[0\] is not contiguous; allowed: contiguous tensors",
    ),
}


def check_refused(verb, change, error, message, **options):
    bucket = make_bucket(THREE)
    change(bucket)
    before = [[t if t.is_meta else t.clone() for t in column] for column in bucket.columns()]
    with pytest.raises(error, match=message):
        bucket.run(verb, rounding=options.pop("rounding", Rounding()), **options)
    for column, old in zip(bucket.columns(), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(column, old, strict=True) if not a.is_meta)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_lists_that_do_not_fit_are_refused(verb, wrong):
    check_refused(verb, *wrong)


@pytest.mark.parametrize("wrong", WRONG_STATES.values(), ids=WRONG_STATES)
def test_states_that_do_not_fit_are_refused(wrong):
    check_refused("adamw", *wrong)


def test_states_of_two_dtypes_are_refused():
    bucket = make_bucket(THREE, BF16)
    bucket.exp_avg_sqs = [t.float() for t in bucket.exp_avg_sqs]
    with pytest.raises(TypeError, match=r"states are exp_avgs bfloat16, exp_avg_sqs float32; allowed: one dtype"):
        bucket.adamw()


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_wrong_options_are_refused(verb):
    same = replaced("params", 0, lambda t: t)
    check_refused(verb, same, ValueError, r"rounding\.uids has 1 entries; allowed: 3", rounding=Rounding(uids=[1]))
    check_refused(verb, same, ValueError, r"backend is 'cuda'; allowed: 'auto', 'triton', 'torch'", backend="cuda")


def test_grad_stats_refuses():
    with pytest.raises(ValueError, match=r"grads is empty; allowed: at least one tensor"):
        grad_stats([])
    with pytest.raises(TypeError, match=r"grads\[1\] is bfloat16; allowed: float32, as grads\[0\]"):
        grad_stats([torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)])
    with pytest.raises(TypeError, match=r"grads\[0\] is float64; allowed: float32, bfloat16, float16"):
        grad_stats([torch.zeros(2, dtype=torch.float64)])


def test_empty_lists_are_no_work():
    adamw_([], [], [], [], [], **ADAMW)
    scaled_update_([], [], [], **SCALED_UPDATE)


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_a_counter_for_each_write(verb):
    """Counters are read as t - 1 and written as t, for empty tensors too; grads that require no grad stay so."""
    bucket = make_bucket([*THREE, Case("empty", (0,))])
    before = [step.item() for step in bucket.steps]
    for _ in range(3):
        bucket.run(verb)
    assert [step.item() for step in bucket.steps] == [step + 3 for step in before]


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_parameters_that_require_grad(verb):
    bucket, plain = make_bucket(THREE), make_bucket(THREE)
    for param in bucket.params:
        param.requires_grad_()
    version = bucket.params[0]._version
    bucket.run(verb)
    plain.run(verb)
    assert bucket.params[0]._version > version
    assert_same_buckets([[t.detach() for t in column] for column in bucket.columns()], plain)


@pytest.mark.parametrize("block", [64, 15])
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_bits_do_not_depend_on_blocks(verb, block, monkeypatch):
    """Noise and update of an element are its own: other cuts, odd starts included, give the same bits."""
    cases = [case for case in SHAPES if case.name in SMALL]
    assert len(cases) == len(SMALL)
    buckets = [make_bucket(cases, BF16) for _ in range(2)]
    for bucket in buckets:
        bucket.grads[0].view(-1)[3] = torch.nan
    whole, cut = buckets
    whole.run(verb)
    monkeypatch.setattr(blocks_module, "BLOCK", block)
    counts = [len(list(blocks_module.blocks(grad))) for grad in cut.grads]
    assert max(counts) > 3
    cut.run(verb)
    assert_same_buckets(cut, whole)


SMALL = ("row", "conv", "conv_channels_last", "experts_transposed", "transposed_param", "misaligned", "expanded_grad")


@pytest.mark.parametrize("block", [1, 4, 24, 1 << 16])
def test_blocks_cover_every_element_once_in_order(block, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", block)
    index = torch.arange(2 * 5 * 3 * 4).view(2, 5, 3, 4)
    for layout in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3), (2, 3, 0, 1)):
        inverse = [layout.index(d) for d in range(4)]
        tensor = index.permute(layout).contiguous().permute(inverse)
        starts, seen = [], []
        for start, (view,) in blocks_module.blocks(tensor):
            starts.append(start)
            assert view.numel() <= block
            seen += view.flatten().tolist()
            assert start == seen[-view.numel()]
        assert seen == list(range(index.numel()))
        assert starts == sorted(starts)


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest storage that an operation inside the block makes, those of ``known`` tensors apart."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("precision", [BF16, Precision(torch.float32, torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("verb", ["adamw", "scaled_update", "grad_stats"])
def test_temporaries_stay_small(verb, layout, precision):
    """No temporary of a tensor of 3 blocks is larger than one fp32 block (plus one pair of noise)."""
    bucket = make_bucket([Case("large", (640, 611), layout, layout)], precision)
    assert bucket.params[0].numel() > 2.9 * blocks_module.BLOCK
    bucket.grads[0][5, 5] = torch.nan
    with LargestAllocation([t for column in bucket.columns() for t in column]) as largest:
        if verb == "grad_stats":
            grad_stats(bucket.grads)
        else:
            bucket.run(verb, transform=GradTransform(clip_value=1.0))
    assert 0 < largest.bytes <= 4 * blocks_module.BLOCK + 8


def test_noise_depends_on_uid_step_and_stream():
    """Two parameters with equal contents round differently, one parameter differently at another step."""
    case = [Case("p", (64, 64))]
    results = {}
    for name, uid, step in (("a", 1, 4.0), ("same", 1, 4.0), ("other_uid", 2, 4.0), ("other_step", 1, 5.0)):
        bucket = make_bucket(case, BF16)
        bucket.steps[0].fill_(step)
        bucket.scaled_update(rounding=Rounding(True, seed=SEED, uids=[uid]))
        results[name] = bucket.params[0]
    assert_same_bits(results["same"], results["a"])
    for other in ("other_uid", "other_step"):
        assert (results[other] != results["a"]).float().mean() > 0.1
