"""Probes of a step: NaN and Inf, gradients that are missing, bfloat16, steps that must change nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowmem_kernels.numerics import name_of

from ..naming import line_of
from .inputs import MATRICES, gradients, same_bits, starts, values
from .recognize import Recognition
from .subject import LR, Subject
from .verdict import Verdict

#: The element of the first matrix that gets a bad gradient.
BAD = (3, 5)


def nonfinite(subject: Subject, found: Recognition, bad: float) -> Verdict:
    """One gradient element that is NaN or Inf, in the third step of five: what it reaches, and whether that ends."""
    probe = "NaN gradient" if bad != bad else "Inf gradient"
    spoiled, clean = ([*gradients(*subject.shapes, steps=5)] for _ in range(2))
    spoiled[2] = [spoiled[2][0].clone(), *spoiled[2][1:]]
    spoiled[2][0][BAD] = bad
    runs = []
    for grads in (spoiled, clean):
        params, optimizer = subject.run(starts(*subject.shapes), grads[:2])
        history = [_copies(params)]
        try:
            for of_step in grads[2:]:
                subject.steps(optimizer, params, [of_step])
                history.append(_copies(params))
        except Exception as error:  # anything that somebody else's code raises
            return Verdict(probe, "raises", f"A step with it raises {line_of(error)}.")
        runs.append(history)
    before, after, later, end = runs[0]
    hit = _reach([~p.isfinite() for p in after])
    left = _reach([~p.isfinite() for p in end])
    if left != "nothing":
        then = "stays so" if left == hit else f"spreads to {_the(left)} by way of the state"
        first = "Nothing is lost at once, but it" if hit == "nothing" else f"{_the(hit).capitalize()} is lost, and"
        return Verdict(probe, f"{left} lost for good", f"{first} {then}.")
    if hit != "nothing":
        return Verdict(probe, f"{hit} lost", f"{_the(hit).capitalize()} is lost.")
    moved = [c != p for c, p in zip(runs[1][1], runs[1][0], strict=True)]
    still = _reach([(a == b) & m for a, b, m in zip(after, before, moved, strict=True)])
    stuck = _reach([(a == b) & (b == c) & m for a, b, c, m in zip(after, later, end, moved, strict=True)])
    if stuck != "nothing":
        return Verdict(
            probe, f"{stuck} stuck", f"{_the(stuck).capitalize()} does not move any more, and nothing is NaN."
        )
    if still == "nothing":
        return Verdict(probe, "acts as a number", "It acts as a finite number, and everything stays finite.")
    what = "all parameters" if still == "everything" else _the(still)
    finding = "step skipped" if still == "everything" else f"{still} skipped"
    return Verdict(
        probe,
        finding,
        f"{what.capitalize()} stay{'' if what.startswith('all') else 's'} for this step; nothing is lost.",
    )


def _copies(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in params]


def _the(reach: str) -> str:
    return {"everything": "everything", "nothing": "nothing"}.get(reach, f"the {reach}")


def _reach(masks: list[Tensor]) -> str:
    """What of the tensors is marked, seen from the bad element of the first."""
    first, others = masks[0], masks[1:]
    if any(mask.any() for mask in others):
        return "everything"
    if not first.any():
        return "nothing"
    rows, columns = (first.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    if (rows, columns) == ([BAD[0]], [BAD[1]]):
        return "element"
    return "row" if rows == [BAD[0]] else "column" if columns == [BAD[1]] else "tensor"


def missing_gradient(subject: Subject, found: Recognition) -> Verdict:
    """A parameter whose grad is None in the first step and there in the second."""
    params = subject.params(starts(*MATRICES))
    start = params[1].detach().clone()
    optimizer = subject.make(params)
    grads = gradients(*MATRICES, steps=2)
    params[0].grad = grads[0][0].to(params[0])
    optimizer.step()
    if not same_bits(params[1], start):
        return Verdict("grad is None", "moves", "A parameter without a gradient is moved.", True)
    subject.steps(optimizer, params, grads[1:])
    if same_bits(params[1], start):
        return Verdict("grad is None", "stuck", "A parameter whose first gradient is late does not move.", True)
    return Verdict("grad is None", "left alone", "A parameter without a gradient is left alone until it has one.")


def bfloat16(subject: Subject, found: Recognition) -> Verdict:
    """Whether updates of an eighth of a spacing move bfloat16 parameters, over 32 steps with the same gradient.

    Rows come twice, so that elements with equal updates are seen to be rounded differently. With stochastic rounding
    the share of float32's way that is gone has a standard deviation of 1.2 %.
    """
    probe, shape, steps = "bfloat16 updates", (64, 64), 32
    grad = values(32, 64, seed=1).repeat(2, 1)
    # the spacing below 1 is 2**-8
    start, target = torch.ones(shape), 2.0**-8 / 8
    moved = _moved(subject, start, grad, steps, LR, torch.float32)
    lr = LR * target * steps / moved.square().mean().sqrt().item()
    exact = _moved(subject, start, grad, steps, lr, torch.float32)
    actual = _moved(subject, start, grad, steps, lr, torch.bfloat16)
    share = ((actual * exact).sum() / exact.square().sum()).item()
    random = not torch.equal(actual[:32], actual[32:])
    figures = {"share of float32's way": share}
    if abs(share) < 0.2:
        sentence = f"Of updates of an eighth of a spacing {share:.0%} arrives: rounding to nearest loses them."
        return Verdict(probe, "lost", sentence, figures=figures)
    how = "stochastic rounding, or noise" if random else "the same for equal elements, so not by random rounding"
    finding = "kept on average" if abs(share - 1) < 0.2 else "partly lost"
    sentence = f"Of updates of an eighth of a spacing {share:.0%} arrives ({how})."
    return Verdict(probe, finding, sentence, figures=figures)


def _moved(subject: Subject, start: Tensor, grad: Tensor, steps: int, lr: float, dtype: torch.dtype) -> Tensor:
    params, _ = subject.run([start], [[grad]] * steps, dtype, lr=lr)
    return params[0].detach().cpu().double() - start.double()


def zero_step(subject: Subject, found: Recognition) -> Verdict:
    """A step with lr = 0 and gradients of zeros, by which torch.distributed.checkpoint makes state: all bits stay."""
    changed = []
    for dtype in (torch.float32, torch.bfloat16):
        params = subject.params(starts(*subject.shapes), dtype)
        before = [p.detach().clone() for p in params]
        optimizer = subject.make(params, **({"weight_decay": 0.1} if subject.takes("weight_decay") else {}))
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        subject.steps(optimizer, params, [[torch.zeros(shape) for shape in subject.shapes]])
        if not all(same_bits(p, b) for p, b in zip(params, before, strict=True)):
            changed.append(name_of(dtype))
    if changed:
        says = f"A step with lr=0 and zero gradients changes {' and '.join(changed)} parameters"
        return Verdict("lr=0, zero gradients", "changes parameters", f"{says}, which loading a checkpoint does.", True)
    return Verdict("lr=0, zero gradients", "nothing changes", "A step with lr=0 and zero gradients changes no bit.")


def leaves_gradients(subject: Subject, found: Recognition) -> Verdict:
    """Whether step() changes or frees gradients."""
    params = subject.params(starts(*subject.shapes))
    optimizer = subject.make(params, **({"weight_decay": 0.1} if subject.takes("weight_decay") else {}))
    grads = [g.to(subject.device) for g in gradients(*subject.shapes, steps=1)[0]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    if any(param.grad is None for param in params):
        return Verdict("gradients after step", "freed", "step() sets gradients to None.")
    if not all(
        same_bits(param.grad, grad) for param, grad in zip(params, grads, strict=True) if param.grad is not None
    ):
        return Verdict("gradients after step", "changed", "step() changes the gradients.", True)
    return Verdict("gradients after step", "the same", "step() leaves the gradients as they are.")


nan = partial(nonfinite, bad=float("nan"))
inf = partial(nonfinite, bad=float("inf"))
