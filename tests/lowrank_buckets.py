"""Buckets of parameters with the moments of a form, and one step of them against the oracle."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import oracles
from buckets import SEED
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.lowrank import MomentumRule, partial_momentum_update_
from lowmem_kernels.testing import Precision, assert_rounded, assert_same_bits, make_tensors
from lowmem_kernels.testing.oracles import lowrank as exact

HYPER = dict(lr=2.0**-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.125)
FP32 = Precision(torch.float32, torch.float32, torch.float32)
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.float32, stochastic=True)
MOMENTA = ("none", "full", "lowrank")
SECONDS = ("element", "rows", "heads", "cols", "factored")
RANK = 3
STATES = ("exp_avgs", "lefts", "rights", "exp_avg_sqs", "row_sqs", "col_sqs")


@dataclass
class MomentumBucket:
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    states: dict[str, list[Tensor]]
    precision: Precision
    cases: list

    def everything(self):
        """All that an update may write."""
        return [*self.params, *self.steps, *(t for tensors in self.states.values() for t in tensors)]

    def rounding(self):
        uids = [(-1) ** i * (i * (2**33 + 3) + 5) for i in range(len(self.params))]
        return Rounding(self.precision.stochastic, seed=SEED, uids=uids)

    def run(self, **options):
        options = {**HYPER, "rounding": self.rounding(), **options}
        partial_momentum_update_(self.params, self.grads, self.steps, **self.states, **options)

    def part(self, indices):
        lists = ([column[i] for i in indices] for column in (self.params, self.grads, self.steps))
        states = {name: [column[i] for i in indices] for name, column in self.states.items()}
        return MomentumBucket(*lists, states, self.precision, [self.cases[i] for i in indices])


def groups_of(second, shape, by_matrix):
    """Entries of v of rows (or columns) for each form: "heads" are groups of two, or all where rows are odd."""
    stack = int(np.prod(shape[:-2])) if by_matrix else 1
    rows = int(np.prod(shape[:-1])) // max(stack, 1) if len(shape) else 1
    if second == "cols":
        return stack * shape[-1]
    if second == "heads":
        return 0 if rows == 0 else stack * (rows // 2 if rows % 2 == 0 else 1)
    return stack * rows


def make_momentum_bucket(cases, momentum, second, precision=FP32, seed=0):
    """States of a run under way, all exact in float32; every step counter differs."""
    bucket = MomentumBucket([], [], [], {}, precision, list(cases))
    add = lambda name, tensor: bucket.states.setdefault(name, []).append(tensor.float())  # noqa: E731
    for i, case in enumerate(cases):
        param, grad = make_tensors(case, precision.param, seed + i, grad_dtype=precision.grad)
        past = make_tensors(case, torch.float32, seed + i + 1000)[1].clone(memory_format=torch.contiguous_format)
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.steps.append(torch.tensor(float(2 * i)))
        generator = torch.Generator().manual_seed(seed + i)
        if momentum == "full":
            add("exp_avgs", 0.3 * past)
        if momentum == "lowrank":
            *stack, m, n = case.shape
            rank = min(RANK, m, n)
            rows = torch.linalg.qr(torch.randn(*stack, n, rank, generator=generator))[0].mT.contiguous()
            # at step 0 there is no momentum
            add("lefts", 1e-3 * torch.randn(*stack, m, rank, generator=generator) * min(2 * i, 1))
            add("rights", rows)
        if second == "element":
            add("exp_avg_sqs", 0.5 * past**2)
        groups = groups_of(second, case.shape, momentum == "lowrank" or second == "cols")
        if second in ("rows", "heads"):
            add("row_sqs", 1e-6 * torch.rand(groups, generator=generator))
        if second == "cols":
            add("col_sqs", 1e-6 * torch.rand(groups, generator=generator))
        if second == "factored":
            add("row_sqs", 1e-6 * torch.rand(case.shape[:-1], generator=generator))
            add("col_sqs", 1e-6 * torch.rand((*case.shape[:-2], case.shape[-1]), generator=generator))
    return bucket


def numpy64(tensor):
    return tensor.detach().double().numpy()


def expected_step(p, g, states, t, rule, hyper):
    """(new p, {state: new value}, size of the largest terms of each element of the update)."""
    beta1, beta2 = hyper["betas"]
    new = {}
    if g.size == 0:
        return p, new, p
    if "exp_avgs" in states:
        new["exp_avgs"] = beta1 * states["exp_avgs"] + (1 - beta1) * g
        u = new["exp_avgs"] / (1 - beta1**t)
        terms = (np.abs(states["exp_avgs"]) + np.abs(g)) / (1 - beta1**t)
    elif "lefts" in states:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in (states["lefts"], states["rights"], g)]
        found = [
            exact.momentum_of(*x, t, beta1, rule.residual_scale, rule.solver, rule.refresh)
            for x in zip(*flat, strict=True)
        ]
        u = np.stack([each[0] for each in found]).reshape(g.shape)
        # the momenta that cancel are as large as their largest row and column, in norm
        sizes = [
            np.abs(x) + (1 / (1 - beta1)) * (np.linalg.norm(left @ right) + np.linalg.norm(x)) / np.sqrt(x.size)
            for left, right, x in zip(*flat, strict=True)
        ]
        terms = 16 * np.stack(sizes).reshape(g.shape)
        new["products"] = np.stack([each[1] @ each[2] for each in found]).reshape(g.shape)
    else:
        u, terms = g, np.abs(g)
    if "exp_avg_sqs" in states:
        new["exp_avg_sqs"], v = exact.second_moment(states["exp_avg_sqs"], g, beta2, "element")
    elif "row_sqs" in states and "col_sqs" in states:
        (new["row_sqs"], new["col_sqs"]), v = exact.second_moment(
            (states["row_sqs"], states["col_sqs"]), g, beta2, "factored"
        )
    else:
        name = "row_sqs" if "row_sqs" in states else "col_sqs"
        new[name], v = exact.second_moment(states[name], g, beta2, "rows" if name == "row_sqs" else "cols")
    x = exact.clipped(exact.normalized(u, v, t, beta2, hyper["eps"]), rule.update_clip)
    largest = exact.normalized(terms, v, t, beta2, hyper["eps"])
    return p - hyper["lr"] * (x + hyper["weight_decay"] * p), new, largest


PLAIN = MomentumRule()


def step_and_check(bucket, rule=PLAIN, transform=None, gradient=None, backend="torch", **options):
    """One step, and all it wrote against the oracle.

    Bounds are 32 units of 2**-24 of the terms of each update, for some 16 operations and the sums in them: a low-rank
    momentum's terms are those of the whole matrix, with the condition of its factors, for which 16 more are ample.
    """
    hyper = {**HYPER, **options}
    before = [p.clone(memory_format=torch.contiguous_format) for p in bucket.params]
    steps = [s.item() for s in bucket.steps]
    states = [{k: numpy64(v[i]).copy() for k, v in bucket.states.items()} for i in range(len(before))]
    bucket.run(rule=rule, transform=transform or GradTransform(), backend=backend, **hyper)
    hyper["lr"] = float(hyper["lr"])
    unit = 2.0**-24
    for i, (param, p) in enumerate(zip(bucket.params, before, strict=True)):
        label = str(bucket.cases[i])
        t = int(steps[i]) + 1
        assert bucket.steps[i].item() == t, label
        g, _ = oracles.transformed(numpy64(bucket.grads[i]), **(gradient or {}))
        expected, new, largest = expected_step(numpy64(p), g, states[i], t, rule, hyper)
        bound = unit * (32 * hyper["lr"] * largest + 4 * np.abs(numpy64(p)))
        stochastic = bucket.precision.stochastic and param.dtype is torch.bfloat16
        assert_rounded(param, torch.as_tensor(expected), torch.as_tensor(bound), stochastic=stochastic, name=label)
        for name, value in new.items():
            if name == "products":
                actual = numpy64(bucket.states["lefts"][i]) @ numpy64(bucket.states["rights"][i])
                size = np.linalg.norm(g) + np.linalg.norm(value)
                assert np.linalg.norm(actual - value) <= 64 * unit * size, f"factors of {label}"
                continue
            actual = numpy64(bucket.states[name][i])
            allowed = 64 * unit * (np.abs(value) + (np.abs(g).max(initial=0) if name == "exp_avgs" else 0)) + 2.0**-149
            assert (np.abs(actual - value.reshape(actual.shape)) <= allowed.reshape(actual.shape)).all(), (
                f"{name} {label}"
            )


def assert_same_momentum_buckets(actual, expected):
    for i, (a, b) in enumerate(zip(actual.everything(), expected.everything(), strict=True)):
        assert_same_bits(a, b, f"tensor {i}")
