"""APOLLO and APOLLO-Mini: SGD whose matrices move as far as Adam would move them, told from a random projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_, projection_matrix
from lowmem_kernels.projection.checks import check_draw, check_rule
from lowmem_kernels.projection.rule import moment_shape, norm_shape, sides_of, takes_pieces

from .base import StateDict
from .buckets import OWN_RULE, Bucket
from .checks import check_choice, check_integer, check_number, check_state_dtype
from .pieces import Dims
from .routed import RoutedOptimizer, RoutedOptions

#: What a group keeps besides options: which projection is in force, counted from 1, and the steps that it has seen.
CLOCK = ("epoch", "epoch_steps")


class APOLLO(RoutedOptimizer):
    """APOLLO: gradient descent with a learning rate for each channel, learnt by Adam on a random projection.

    Of a matrix G of m rows and n columns, the shorter dimension is contracted with a random P of ``rank`` rows (of
    square matrices the columns), and an element c of the longer one is a channel. With ``R_c = P G_c``,

    ``M += (1 - beta1)(R - M)``, ``V += (1 - beta2)(R² - V)``, ``R~ = M / (sqrt(V) + eps)``,
    ``X_c = G_c |R~_c| / |R_c|``, or with scale_type "tensor" ``X = G |R~| / |R|``,
    ``X *= min(1, 1.01 |X before| / |X|)``, unless disable_nl,
    ``p -= lr sqrt(scale) sqrt(1 - beta2^t) / (1 - beta1^t) X``, then ``p -= lr weight_decay p``

    P is drawn anew every ``update_proj_gap`` steps of its group; the moments stay as they are. All that is no matrix
    gets the fallback, see RoutedOptions; embeddings and the output layer should, by the groups of `split_params`.

    Args:
        params: parameters, (name, parameter) pairs or groups such as `split_params` makes; float32, bfloat16, float16.
            Names decide which projections are drawn at rank 1, so that adding a parameter changes no other's.
        lr: step length, in units of Adam's.
        rank: r >= 1. A matrix whose shorter dimension has no more elements is not projected, and has Adam's moments.
        scale: its square root multiplies the update, as in the authors' implementation; the paper's alpha is that root.
            min(m, n) / r makes an update about as large as Adam's.
        scale_type: "channel" or "tensor".
        update_proj_gap: steps from one projection to the next.
        proj_type: which dimension is contracted: "std", "reverse_std" (the longer), "right" (columns), "left" (rows).
        betas: decay rates of the moments.
        eps: in units of the gradient; not corrected for bias.
        weight_decay: decoupled, multiplied by lr, applied after the update.
        disable_nl: do not limit the growth of an update's norm.
        state_dtype: of the moments: "fp32" or "param", the parameter's dtype, which has to be bfloat16 or float32.
            bfloat16 needs stochastic rounding: to nearest, 0.999 V is V.
        source: of projections: "gaussian"; "rademacher", signs, from rank 8 on; "torch", by torch's generators, which
            is slow, and is for comparisons.
        **options: see RoutedOptions.

    State: ``step``, ``uid`` and ``epoch``, the number of the last projection; ``exp_avg`` and ``exp_avg_sq`` of shape
    [..., m, r] where columns are contracted and [..., r, n] where rows are; ``update_norm``, the norm of the last X of
    each matrix, in float32. A group keeps ``epoch`` and ``epoch_steps``, int64. P is not kept. The fallback's own.

    Source: arXiv 2412.05270, algorithm 1 and equations 3 to 9.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        rank: int = 256,
        scale: float = 1.0,
        scale_type: str = "channel",
        update_proj_gap: int = 200,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        disable_nl: bool = False,
        state_dtype: str = "fp32",
        source: str = "gaussian",
        **options: Unpack[RoutedOptions],
    ) -> None:
        own = {
            "lr": lr,
            "rank": rank,
            "scale": scale,
            "scale_type": scale_type,
            "update_proj_gap": update_proj_gap,
            "proj_type": proj_type,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "disable_nl": disable_nl,
            "state_dtype": state_dtype,
            "source": source,
        }
        super().__init__(params, own, options)

    def projection(self, param: Tensor) -> Tensor:
        """Return P as the parameter's last update used it, float32 [rank, contracted elements]; the identity if none.

        Raises ValueError for a parameter that is not one of this optimizer's matrices, or has not been updated yet.
        """
        group = next((g for g in self.param_groups if any(p is param for p in g["params"])), None)
        state = self.state.get(param, {})
        if group is None or self.rule_of(param, group) != OWN_RULE or not int(state.get("epoch", 0)):
            raise ValueError("param has no projection; allowed: a matrix of this optimizer that has been updated")
        return projection_matrix(
            param.shape,
            rank=group["rank"],
            draw=Draw(group["source"], group["seed"], [state["uid"]], int(state["epoch"])),
            proj_type=group["proj_type"],
            conv=group["stacks"] == "conv",
            device=param.device,
            backend=group["backend"],
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        check_integer("update_proj_gap", options["update_proj_gap"])
        check_number("weight_decay", options["weight_decay"])
        check_choice("disable_nl", options["disable_nl"], (True, False))
        check_choice("state_dtype", options["state_dtype"], ("fp32", "param"))
        check_number("scale", options["scale"])
        check_number("eps", options["eps"], positive=True)
        check_rule(self.rule(options))
        check_draw(Draw(options["source"]), options["rank"])
        if options["source"] == "torch" and options["capturable"]:
            raise ValueError("source is 'torch' and capturable is True; allowed: one of them")

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        check_state_dtype(param, group)

    def rule(self, group: Mapping[str, Any]) -> ApolloRule:
        """Return what the options of a group ask for."""
        return ApolloRule(
            rank=group["rank"],
            scale_type=group["scale_type"],
            scale=group["scale"],
            proj_type=group["proj_type"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            growth_limit=None if group["disable_nl"] else 1.01,
            conv=group["stacks"] == "conv",
        )

    def new_matrix_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        rule, shape, device = self.rule(group), tuple(param.shape), param.device
        dtype = param.dtype if group["state_dtype"] == "param" else torch.float32
        return {
            "exp_avg": torch.zeros(moment_shape(shape, rule), dtype=dtype, device=device),
            "exp_avg_sq": torch.zeros(moment_shape(shape, rule), dtype=dtype, device=device),
            "update_norm": torch.zeros(norm_shape(shape, rule), device=device),
            "epoch": torch.zeros((), device=device),
        }

    def state_dims(self, key: str, param: Tensor, group: Mapping[str, Any], place: int) -> Dims:
        if self.rule_of(param, group) != OWN_RULE:
            return super().state_dims(key, param, group, place)
        rule, outer = self.rule(group), range(0 if group["stacks"] == "conv" else param.ndim - 2)
        if key == "update_norm":
            return outer
        sides = sides_of(tuple(param.shape), rule.rank, rule.proj_type, rule.conv)
        if not sides.projected:
            return range(param.ndim)
        # a convolution's columns are several dimensions of it
        columns = None if len(outer) != param.ndim - 2 else param.ndim - 1
        return (*outer, len(outer), None) if sides.right else (*outer, None, columns)

    def begin_step(self, buckets: list[Bucket]) -> None:
        """Advance the clocks of projections, on the device: only there is it known whether the step is skipped."""
        for group, found_inf in {id(b.group): (b.group, b.transform.found_inf) for b in buckets}.values():
            epoch, steps = (group[name] for name in CLOCK)
            due = steps % group["update_proj_gap"] == 0
            if found_inf is None:
                steps += 1
            else:
                moves = found_inf.to(steps.device, non_blocking=True) == 0
                due &= moves
                steps += moves
            epoch += due

    def takes_pieces_of_matrices(self, bucket: Bucket) -> bool:
        return takes_pieces(self.rule(bucket.group)) and bucket.pieces() is not None

    def update_matrices(self, bucket: Bucket) -> None:
        group = bucket.group
        epoch = group["epoch"].to(bucket.device, non_blocking=True)
        apollo_update_(
            bucket.params,
            bucket.grads,
            bucket.state("exp_avg"),
            bucket.state("exp_avg_sq"),
            bucket.state("update_norm"),
            bucket.state("epoch"),
            bucket.state("step"),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            rule=self.rule(group),
            draw=Draw(group["source"], group["seed"], bucket.uids, epoch),
            pieces=bucket.pieces(),
            **bucket.options(),
        )

    # the clock of projections

    def complete_group(self, group: dict[str, Any]) -> None:
        super().complete_group(group)
        _place_clock(group)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _place_clock(group)


class APOLLOMini(APOLLO):
    """APOLLO-Mini, which is `APOLLO` of rank 1 with one factor for all of a matrix: two numbers of state for a channel.

    Args:
        params, lr, scale, update_proj_gap, proj_type, betas, eps, weight_decay, disable_nl, state_dtype: as in
            `APOLLO`. The scale of 128 is the authors'; they take larger ones for larger models.
        source: "gaussian" or "torch"; signs need rank 8.
        **options: see RoutedOptions.

    State: as `APOLLO`.

    Source: arXiv 2412.05270, section 4.2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        scale: float = 128.0,
        update_proj_gap: int = 200,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        disable_nl: bool = False,
        state_dtype: str = "fp32",
        source: str = "gaussian",
        **options: Unpack[RoutedOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            1,
            scale,
            "tensor",
            update_proj_gap,
            proj_type,
            betas,
            eps,
            weight_decay,
            disable_nl=disable_nl,
            state_dtype=state_dtype,
            source=source,
            **options,
        )


def _place_clock(group: dict[str, Any]) -> None:
    """Put the clock of a group beside its parameters, at 0 if it is new."""
    device = next((param.device for param in group["params"]), None)
    for name in CLOCK:
        group[name] = torch.as_tensor(group.get(name, 0), dtype=torch.int64, device=device)
