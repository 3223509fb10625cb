"""Probes of the rule: which it is, the order of its decay, the place of its eps, the rank of its update, its shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .inputs import gradients, starts, values
from .recognize import STEPS, Recognition, distance, plain
from .subject import LR, Subject
from .verdict import Verdict

#: What is meant by the places of `lowmem_kernels.testing.oracles`.
PLACES = {
    "outside": "added outside the root, sqrt(v) + eps",
    "inside": "added inside the root, sqrt(v + eps)",
    "uncorrected": "added outside the root, before the bias of v is corrected: it counts for more in early steps",
    "square": "added on g², before its means are taken",
    "floor": "a floor, max(sqrt(v), eps)",
}


def rule(subject: Subject, found: Recognition) -> Verdict:
    """Which known rule it agrees with."""
    nearest = found.nearest
    distances = found.distances[nearest.name]
    figures = {f"{nearest.name}, {condition}": value for condition, value in distances.items()}
    agreeing = found.agreeing
    off = [condition for condition, value in distances.items() if value > 1]
    if not off:
        named = ([nearest] if found.against else []) + [each for each in agreeing if each is not found.against]
        names = " = ".join(each.name for each in named)
        within = f"within {max(distances.values()):.2g} tolerances after {STEPS} steps"
        return Verdict("rule", names, f"It agrees with {names} ({nearest.title}), {within}.", figures=figures)
    wrong = found.against is not None
    apart = ", ".join(f"{distances[condition]:.1e} tolerances with {condition}" for condition in off)
    if found.known:
        sentence = f"It agrees with {nearest.name} ({nearest.title}), but is off by {apart}."
        return Verdict("rule", f"{nearest.name}, not with {', '.join(off)}", sentence, wrong, figures)
    if found.against:
        also = f" It agrees with {agreeing[0].name}." if agreeing else ""
        sentence = (
            f"It is not {nearest.name} ({nearest.title}): off by {apart.replace('with plain', 'as it is')}.{also}"
        )
        return Verdict("rule", f"not {nearest.name}", sentence, True, figures)
    off_by = f"the nearest is {nearest.name}, off by {distances['plain']:.1e} tolerances"
    sentence = f"It agrees with no rule that is known here; {off_by}."
    return Verdict("rule", "none known", sentence, figures=figures)


def rank(subject: Subject, found: Recognition) -> Verdict:
    """The rank of the first update of a matrix, whose gradient has full rank."""
    shape = (16, 24)
    # some only look in their first step
    for steps in (1, 2, 3):
        params, _ = subject.run([torch.zeros(shape)], gradients(shape, steps=steps))
        if params[0].any():
            break
    singular = torch.linalg.svdvals(params[0].detach().cpu().double())
    # float32's rounding leaves about 1e-7 of the largest
    count = int((singular > 1e-5 * singular[0]).sum())
    full = count == min(shape)
    finding = "full" if full else str(count)
    sentence = (
        f"The first update of a {shape[0]} x {shape[1]} matrix has rank {count}{', which is full' if full else ''}."
    )
    return Verdict("rank of update", finding, sentence, figures={"rank": count, "of": min(shape)})


def decay(subject: Subject, found: Recognition) -> Verdict:
    """Where weight decay enters, found from steps with and without it, all from the same values.

    The last two of three steps, as some only look in their first.
    """
    probe = "weight decay"
    if not subject.takes("weight_decay"):
        return Verdict(probe, "none", "It takes no weight_decay.")
    weight, lr = 0.1, 0.1
    # of RMS 2, so that a rate in units of the parameter is not lr
    start = 2 * starts((9, 14))[0]
    without, decayed, stopped = (
        _last_two(subject, start, lr, weights) for weights in ((0.0,) * 3, (weight,) * 3, (weight, weight, 0.0))
    )
    left_in_state = torch.linalg.vector_norm(stopped[1] - without[1]) / torch.linalg.vector_norm(without[1] - start)
    if left_in_state > 1e-4:
        says = "added to the gradient, and so to the state, and is rescaled with the gradient (L2, not decoupled)"
        return Verdict(
            probe, "coupled", f"Weight decay is {says}.", figures={"left in the state": left_in_state.item()}
        )
    fits = [
        {name: _fit(q - p, base) for name, base in (("old", start.double()), ("new", p))}
        for p, q in zip(without, decayed, strict=True)
    ]
    base = min(fits[0], key=lambda name: fits[0][name][1])
    first, second = (-fit[base][0] / weight for fit in fits)
    figures = {"factor at step 2": first, "factor at step 3": second}
    if all(torch.equal(p, q) for p, q in zip(without, decayed, strict=True)):
        return Verdict(probe, "without effect", "Weight decay does nothing.", True, figures)
    if fits[0][base][1] > 1e-3:
        says = "not proportional to the parameter: added to a gradient that is then normalized, or masked"
        return Verdict(probe, "not proportional", f"Weight decay is {says}.", figures=figures)
    size = start.square().mean().sqrt().item()
    scales = {"lr": lr, "nothing": 1.0, "lr RMS(p)": lr * size}
    scale = next((name for name, value in scales.items() if abs(first / value - 1) < 2e-2), f"{first:.3g}")
    if abs(second - first) > 2e-2 * abs(first):
        scale = f"{first:.3g} and {second:.3g} in two steps"
    # an update that is too small to tell
    order = "old" if abs(fits[0]["old"][1] - fits[0]["new"][1]) < 1e-6 else base
    where = {"old": "taken of the value before the update", "new": "taken of the value after the update"}[order]
    times = "not multiplied by lr" if scale == "nothing" else f"multiplied by {scale}"
    sentence = f"Weight decay is decoupled, {times}, and {where}."
    return Verdict(probe, f"decoupled, times {scale}, of the {order} value", sentence, figures=figures)


def _last_two(subject: Subject, start: Tensor, lr: float, weights: tuple[float, ...]) -> list[Tensor]:
    """The values after the last two of three steps with these weight decays, each from the same start."""
    params = subject.params([start])
    optimizer = subject.make(params, lr=lr, weight_decay=weights[0])
    ends = []
    for weight, of_step in zip(weights, gradients(tuple(start.shape), steps=3), strict=True):
        for group in optimizer.param_groups:
            group["weight_decay"] = weight
        with torch.no_grad():
            params[0].copy_(start)
        subject.steps(optimizer, params, [of_step])
        ends.append(params[0].detach().cpu().double())
    return ends[1:]


def _fit(difference: Tensor, base: Tensor) -> tuple[float, float]:
    """The c of difference = c base, and what of the difference is left."""
    factor = ((difference * base).sum() / base.square().sum()).item()
    left = torch.linalg.vector_norm(difference - factor * base) / torch.linalg.vector_norm(difference).clamp(min=1e-30)
    return factor, left.item()


def eps(subject: Subject, found: Recognition) -> Verdict:
    """Where eps is added, for rules of which several places are known."""
    if not subject.takes("eps"):
        return Verdict("place of eps", "none", "It takes no eps.")
    if not found.known:
        return Verdict(
            "place of eps", "unknown", "No rule is recognized, so that eps has no place that could be named."
        )
    if not found.places:
        return Verdict("place of eps", "one only", f"{found.nearest.name} has one place for eps.")
    place = min(found.places, key=lambda name: found.places[name])
    figures = {f"eps {name}": value for name, value in found.places.items()}
    if found.places[place] > 1:
        sentence = f"None of the places that are known ({', '.join(found.places)}) gives its numbers when eps is large."
        return Verdict("place of eps", "none known", sentence, figures=figures)
    sentence = f"eps is {PLACES[place]}."
    return Verdict("place of eps", place, sentence, figures=figures)


#: By name, a tensor of each kind that optimizers stumble over.
SHAPES = {
    "1-D": values(11, seed=0),
    "1 x N": values(1, 33, seed=1),
    "M x 1": values(33, 1, seed=2),
    "scalar": values(seed=3),
    "4-D convolution": values(6, 4, 3, 3, seed=4),
    "transposed": values(9, 14, seed=5).T,
    "strided": values(8, 22, seed=6)[:, ::2],
    "empty": values(0, 5, seed=7),
}


def shapes(subject: Subject, found: Recognition) -> Verdict:
    """Odd shapes and layouts: whether they run and follow the rule or, if none is known, make no difference."""
    odd, figures = [], {}
    for name, start in SHAPES.items():
        grads = gradients(tuple(start.shape), steps=3)
        try:
            if found.known:
                with np.errstate(all="ignore"):
                    figures[name] = distance(found.nearest, subject, [start], grads, **plain(subject))
                if figures[name] > 1:
                    odd.append(f"{name} is {figures[name]:.1e} tolerances off")
            else:
                end, other = (subject.run([each], grads)[0][0] for each in (start, start.contiguous()))
                if not torch.allclose(end, other, rtol=1e-5, atol=1e-5 * LR):
                    odd.append(f"{name} has other numbers than contiguous")
        except Exception as error:  # anything that somebody else's code raises
            odd.append(f"{name} raises {type(error).__name__}")
    if odd:
        return Verdict("shapes", "; ".join(odd), f"Of {', '.join(SHAPES)}: {'; '.join(odd)}.", True, figures)
    against = f"follow {found.nearest.name}" if found.known else "run"
    return Verdict("shapes", "all", f"{', '.join(SHAPES)}: all {against}.", figures=figures)
