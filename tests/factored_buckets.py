"""A bucket of tensors, as an optimizer hands it to a factored verb. The same arguments make equal buckets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from buckets import FP32, Lists
from lowmem_kernels.factored import FactoredRule, confidence_update_, factored_update_
from lowmem_kernels.testing import Case, Precision, assert_same_bits, make_tensors

#: The lists in the order of confidence_update_'s arguments.
NAMES = ("params", "grads", "exp_avgs", "rows", "cols", "res_rows", "res_cols", "steps")

EPS32 = torch.finfo(torch.float32).eps
#: What transformers, AdaLomo and torch.optim call Adafactor, and two more that use what is left of a rule. The last
#: does not clip at all, since clipping hides a wrong scale.
RULES = {
    "relative": dict(lr=1e-2, weight_decay=0.0, rule=FactoredRule(lr_schedule="rsqrt")),
    "external": dict(lr=1e-3, weight_decay=0.1, rule=FactoredRule(scale_parameter=False, beta1=0.9)),
    "adalomo": dict(lr=1e-3, weight_decay=0.1, rule=FactoredRule()),
    "torch": dict(
        lr=1e-2,
        weight_decay=0.1,
        rule=FactoredRule(eps=(EPS32, 1e-3), eps_floor=True, lr_schedule="rsqrt", scale_decay=False),
    ),
    "constant_beta2": dict(
        lr=1e-3,
        weight_decay=0.1,
        rule=FactoredRule(beta2=0.99, clip_threshold=1e3, lr_schedule="warmup", scale_parameter=False),
    ),
}
CAME = dict(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip_threshold=1.0)
#: A verb and its options for every dialect.
DIALECTS = {**{name: ("factored", options) for name, options in RULES.items()}, "came": ("confidence", CAME)}


@dataclass
class Bucket(Lists):
    names = NAMES
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor | None]
    res_rows: list[Tensor | None]
    res_cols: list[Tensor | None]
    steps: list[Tensor]
    cases: list[Case]
    precision: Precision

    def run(self, verb, **options):
        options = {"rounding": self.rounding(), **(CAME if verb == "confidence" else RULES["relative"]), **options}
        if verb == "confidence":
            confidence_update_(*self.columns(), **options)
            return
        if options["rule"].beta1 is not None:
            options = {"exp_avgs": self.exp_avgs, **options}
        factored_update_(self.params, self.grads, self.rows, self.cols, self.steps, **options)


def make_bucket(cases, precision=FP32, seed=0, fresh=False, verb="factored"):
    """One parameter per case with states of a run under way, or zeros where ``fresh``; every step counter differs.

    The momentum of "confidence" is in units of a normalized update, that of "factored" of the parameter.
    """
    bucket = Bucket(*([] for _ in NAMES), list(cases), precision)
    for i, case in enumerate(cases):
        param, grad = make_tensors(case, precision.param, seed + i, grad_dtype=precision.grad)
        _, past = make_tensors(case, torch.float32, seed + i + 1000)
        past = torch.zeros(case.shape) if fresh else past.clone(memory_format=torch.contiguous_format)
        square = 0.0 if fresh else 0.7 * past**2 + 1e-9
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.exp_avgs.append(((300 if verb == "confidence" else 0.3) * past).to(precision.state))
        for rows, cols, scale in ((bucket.rows, bucket.cols, 1.0), (bucket.res_rows, bucket.res_cols, 1e5)):
            moment = scale * (past if fresh else square)
            matrix = len(case.shape) >= 2
            rows.append(average(moment, -1) if matrix else moment)
            cols.append(average(moment, -2) if matrix else None)
        if len(case.shape) < 2:
            bucket.res_rows[-1] = None
        bucket.steps.append(torch.tensor(0.0 if fresh else float(3 * i + 1)))
    return bucket


def average(moment, dim):
    """Means over a dimension, 0 where there is nothing to take them of."""
    return moment.mean(dim).nan_to_num().contiguous()


def set_gradients(bucket, cases, seed, change=lambda grad: grad):
    """Replace the values of the gradients, in place, by ``change`` of those of a case."""
    for i, (case, grad) in enumerate(zip(cases, bucket.grads, strict=True)):
        values = change(make_tensors(case, torch.float32, seed + i)[1].clone()).to(grad.dtype)
        expanded = case.grad_layout == "expanded"
        (grad[..., :1] if expanded else grad).copy_(values[..., :1] if expanded else values)


def assert_same_buckets(actual, expected, names=NAMES):
    """Every tensor of two buckets, or of two results of ``copies``, has the same bits."""
    actual, expected = (x.columns() if isinstance(x, Bucket) else x for x in (actual, expected))
    for name, column, other in zip(NAMES, actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(column, other, strict=True)):
            if name in names and b is not None:
                assert_same_bits(a, b, f"{name}[{i}]")
