"""What parameters that are no matrices get from an optimizer whose own rule is for matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_kernels.elementwise import adamw_
from lowmem_kernels.factored import FactoredRule, factored_update_
from lowmem_kernels.multinorm import NormRule, sinkhorn_update_

from .buckets import Bucket
from .factored import new_second_moment, second_moments

#: AdamW; Adafactor in units of the parameter; a normalized momentum, which has one moment and no second
FALLBACKS = ("adamw", "adafactor", "table")

# a relative step would not be comparable with those of the two others
ADAFACTOR = FactoredRule(scale_parameter=False, scale_decay=False)

# DeepSeek-V4.1's rule for embeddings, heads and other tables. It ends on rows, so that frequent and rare tokens move
# alike; 0.18 is the RMS of Adam's updates. The decay rate of the momentum was not published.
TABLE = NormRule(norms=(*("row", "col") * 5, "row"), scale=0.18, row_threshold=1e-3, momentum=0.9, nesterov=True)


def new_fallback_state(rule: str, param: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first update by one of FALLBACKS, in float32."""
    if rule == "adafactor":
        return new_second_moment(param)
    keys = ("exp_avg", "exp_avg_sq") if rule == "adamw" else ("exp_avg",)
    return {key: torch.zeros(param.shape, dtype=torch.float32, device=param.device) for key in keys}


def fallback_update_(bucket: Bucket, lr: float | Tensor) -> None:
    """Update the parameters of a bucket by its rule, one of FALLBACKS, at this rate."""
    group = bucket.group
    common = {"lr": lr, "weight_decay": group["weight_decay"], **bucket.options()}
    params, grads, steps = bucket.params, bucket.grads, bucket.state("step")
    if bucket.rule == "adamw":
        adamw_(
            params,
            grads,
            bucket.state("exp_avg"),
            bucket.state("exp_avg_sq"),
            steps,
            betas=group["fallback_betas"],
            eps=group["fallback_eps"],
            shards=bucket.shards,
            **common,
        )
    elif bucket.rule == "adafactor":
        rows, cols = second_moments(bucket)
        factored_update_(params, grads, rows, cols, steps, rule=ADAFACTOR, pieces=bucket.pieces(), **common)
    else:
        exp_avgs = bucket.state("exp_avg")
        sinkhorn_update_(params, grads, steps, rule=TABLE, exp_avgs=exp_avgs, pieces=bucket.pieces(), **common)
