"""What `MNGD` does where "spectral" is among its norms: matrices are whitened between norms of rows and columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.multinorm import NormRule, rank1_apply_, sinkhorn_scales, sinkhorn_update_
from lowmem_kernels.multinorm.rule import keeps_elements, steps_of
from lowmem_kernels.whitening import WhiteningRule, whiten_, whitened

#: Elements of the parameters for which there are fp32 matrices at a time, two for each: 256 MB.
AT_A_TIME = 1 << 25


def check_spectral(options: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of `MNGD` does not go with "spectral" among its norms."""
    for name, allowed in (("momentum", 0), ("eps", None)):
        if options[name] != allowed:
            raise ValueError(
                f"{name} is {options[name]!r} and norms is {options['norms']!r}; allowed with 'spectral': {allowed}"
            )


def spectral_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: NormRule,
    whitening: WhiteningRule,
    transform: GradTransform,
    rounding: Rounding,
    backend: str,
) -> None:
    """As `sinkhorn_update_`, by a rule with "spectral" among its norms, which ``whitening`` approximates.

    A parameter with a NaN or Inf in its gradient keeps its value and its step if ``transform.skip_nonfinite``, and is
    counted as one, whatever the other norms are.

    Traffic: that of `whiten_` where "spectral" is the last norm, and nothing, or that of rows, comes before. Otherwise
    each stretch of other norms before a "spectral" writes an fp32 matrix, which is then read three times instead of the
    gradient, and each "spectral" with a norm after it writes one, too.
    """
    shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "backend": backend}
    before, after = cut(rule.norms)
    if len(before) == 1 and not after and _is_read(before[0]):
        by = _whitening_of(before[0], whitening)
        whiten_(params, grads, steps, scale=rule.scale, rule=by, transform=transform, rounding=rounding, **shared)
        return
    uids = range(len(params)) if rounding.uids is None else rounding.uids
    for some in _parts(params):
        shared["rounding"] = replace(rounding, uids=uids[some])
        _update_some_(params[some], grads[some], steps[some], rule, whitening, transform, shared)


def cut(norms: Sequence[str]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return the norms before each "spectral", since the one before it, and those after the last."""
    stretches: list[tuple[str, ...]] = [()]
    for norm in norms:
        if norm == "spectral":
            stretches.append(())
        else:
            stretches[-1] += (norm,)
    return stretches[:-1], stretches[-1]


def _parts(params: Sequence[Tensor]) -> Iterator[slice]:
    """Cut parameters into parts of at most AT_A_TIME elements, or of a single one."""
    start, elements = 0, 0
    for i, param in enumerate(params):
        elements += param.numel()
        if i > start and elements > AT_A_TIME:
            yield slice(start, i)
            start, elements = i, param.numel()
    yield slice(start, len(params))


def _is_read(norms: tuple[str, ...]) -> bool:
    """Whether whitening does the norms as it reads the gradient: none, or rows; a total scale before it is nothing."""
    found = steps_of(norms)
    return not found.sign and found.half in ((), ("row",))


def _whitening_of(norms: tuple[str, ...], whitening: WhiteningRule) -> WhiteningRule:
    return replace(whitening, normalize="row" if "row" in norms and _is_read(norms) else None)


def _update_some_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: NormRule,
    whitening: WhiteningRule,
    transform: GradTransform,
    shared: Mapping[str, Any],
) -> None:
    """Do what `spectral_update_` does, with fp32 matrices in the place of gradients."""
    # the sign and scale of the gradient are those of what is made of it
    made = GradTransform(
        found_inf=transform.found_inf, skip_nonfinite=transform.skip_nonfinite, skipped=transform.skipped
    )
    before, after = cut(rule.norms)
    for k, norms in enumerate(before):
        by = _whitening_of(norms, whitening)
        if not _is_read(norms):
            grads, transform = _normalized(grads, replace(rule, norms=norms), transform, shared["backend"]), made
        if k == len(before) - 1 and not after:
            whiten_(params, grads, steps, scale=rule.scale, rule=by, transform=transform, **shared)
            return
        grads, transform = whitened(grads, rule=by, transform=transform, backend=shared["backend"]), made
    rule = replace(rule, norms=after)
    if keeps_elements(rule) and transform.skip_nonfinite:
        _update_or_keep_(params, list(grads), steps, rule, transform, shared)
    else:
        sinkhorn_update_(params, grads, steps, rule=rule, transform=transform, **shared)


def _normalized(grads: Sequence[Tensor], rule: NormRule, transform: GradTransform, backend: str) -> list[Tensor]:
    """Return X of each gradient, contiguous float32 of its shape; what is not finite leaves a NaN or Inf in it."""
    rows, cols = sinkhorn_scales(grads, rule=rule, transform=transform, backend=backend)
    results = [torch.zeros(g.shape, dtype=torch.float32, device=g.device) for g in grads]
    counters = [*torch.zeros(len(grads), device=grads[0].device).unbind()]
    sign = steps_of(rule.norms).sign
    # 0 - (-1) X, in one launch for all
    rank1_apply_(
        results,
        grads,
        rows,
        cols,
        counters,
        lr=-1.0,
        weight_decay=0.0,
        sign=sign,
        conv=rule.conv,
        transform=replace(transform, skip_nonfinite=False),
        backend=backend,
    )
    if sign and transform.skip_nonfinite:
        # of an Inf the sign is 1, and 0 times it NaN
        torch._foreach_add_(results, list(grads), alpha=0.0)
    return results


def _update_or_keep_(
    params: Sequence[Tensor],
    grads: list[Tensor],
    steps: Sequence[Tensor],
    rule: NormRule,
    transform: GradTransform,
    shared: Mapping[str, Any],
) -> None:
    """`sinkhorn_update_` by a rule that would keep elements, rows or columns, for whole parameters.

    Gradients are written to: one of a stack that is not finite makes all of them NaN, of which every element is kept.
    """
    lengths = torch._foreach_norm(grads)
    torch._foreach_add_(grads, [length * 0.0 for length in lengths])
    sinkhorn_update_(params, grads, steps, rule=rule, transform=replace(transform, skipped=None), **shared)
    kept = torch.stack(lengths).isfinite().logical_not_()
    if transform.found_inf is not None:
        kept &= transform.found_inf == 0
    torch._foreach_sub_(list(steps), list(kept.float().unbind()))
    if transform.skipped is not None:
        transform.skipped.add_(kept.sum())
