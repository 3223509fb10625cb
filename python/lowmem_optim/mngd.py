"""Multi-normalized gradient descent: matrices move by their gradient, normalized by several norms in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.multinorm import NormRule, sinkhorn_update_
from lowmem_kernels.multinorm.checks import check_rule
from lowmem_kernels.whitening import WhiteningRule

from .buckets import Bucket
from .checks import check_choice, check_integer, check_number, check_state_dtype
from .factored import new_momentum
from .routed import RoutedOptimizer, RoutedOptions
from .spectral import check_spectral, spectral_update_
from .swan import check_solver


class MNGD(RoutedOptimizer):
    """Multi-normalized gradient descent, which needs no state for matrices.

    For a matrix g of n rows and m columns, X = g, and then ``iterations`` times all of ``norms`` in order:

    "row": ``X_ij = sqrt(m) X_ij / |X_i.|``, "col": ``X_ij = sqrt(n) X_ij / |X_.j|``,
    "frobenius": ``X = sqrt(n m) X / |X|``, "sign": ``X_ij = X_ij / |X_ij|``,
    "spectral": ``X = (X X^T)^(-1/2) X``, then "frobenius"

    ``p -= lr (scale X + weight_decay p)``. All that is no matrix gets the fallback, see RoutedOptions.

    Every norm leaves X with RMS 1, so that lr means the same for all of them; the last one holds exactly. Rows of zeros
    stay zeros, and X does not depend on the gradient's scale: clipping and loss scaling change nothing.

    Some known rules: ``("row", "col")`` is `SinkGD`; ``("row",)`` with one iteration normalizes the weights of each
    output of an nn.Linear (SRON, and SCALE apart from its momentum and its embeddings); ``("sign",)`` is signSGD;
    ``("row", "spectral")`` with one iteration is `SWAN` without centring.

    Args:
        params: parameters, (name, parameter) pairs or groups such as `split_params` makes; float32, bfloat16, float16.
        lr: step length, in units of the parameter for an update of RMS 1, before ``scale``.
        norms: of "row", "col", "frobenius", "sign", "spectral", in order; "spectral" without momentum and eps.
        iterations: how often they follow each other, >= 1.
        scale: factor of the update, >= 0, but not of the decay. The fallback's rate is lr * scale.
        weight_decay: decoupled, multiplied by lr.
        momentum: mu in [0, 1): X is that of ``M = mu M + g``, or with nesterov that of ``g + mu M``; 0: no state.
        nesterov: look ahead by one more step of the momentum.
        momentum_after: ``M += (1 - mu)(X - M)`` is a momentum of X instead and takes its place; with nesterov
            ``X + mu (M - X)`` does.
        eps: None, or a bound on every norm from below, in units of the gradient, as ports have it; for "row" and "col"
            in turns.
        state_dtype: of the momentum: "fp32" or "param", the parameter's dtype, which has to be bfloat16 or float32.
        solver, solver_iterations, beta: of "spectral", as solver, iterations and beta of `SWAN`. "coupled" with a beta
            of 0.5 converges to the projection that the paper means; small singular values take it more iterations.
        **options: see RoutedOptions.

    State: ``step`` and ``uid``; ``exp_avg`` of the parameter's shape if there is a momentum. The fallback's own.
    Memory in a step with "spectral": that of `SWAN`; up to 256 MB at a time for fp32 matrices, or two of the largest
    parameter's size, unless "spectral" comes last, after nothing or "row".

    Source: arXiv 2502.06742, algorithms 1 and 2; momentum, decay and scale are not in them.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        norms: Sequence[str] = ("row", "col"),
        iterations: int = 5,
        scale: float = 0.05,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        momentum_after: bool = False,
        eps: float | None = None,
        state_dtype: str = "fp32",
        solver: str = "coupled",
        solver_iterations: int | None = None,
        beta: float = 0.5,
        **options: Unpack[RoutedOptions],
    ) -> None:
        own = {
            "lr": lr,
            "norms": norms,
            "iterations": iterations,
            "scale": scale,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_after": momentum_after,
            "eps": eps,
            "state_dtype": state_dtype,
            "solver": solver,
            "solver_iterations": solver_iterations,
            "beta": beta,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        check_norms(options["norms"])
        check_integer("iterations", options["iterations"])
        check_number("scale", options["scale"])
        check_number("weight_decay", options["weight_decay"])
        check_number("momentum", options["momentum"], below=1)
        check_choice("nesterov", options["nesterov"], (True, False))
        check_choice("momentum_after", options["momentum_after"], (True, False))
        if options["eps"] is not None:
            check_number("eps", options["eps"], positive=True)
        check_choice("state_dtype", options["state_dtype"], ("fp32", "param"))
        check_solver(options, "solver_iterations")
        if "spectral" in options["norms"]:
            check_spectral(options)
        # which knows of no "spectral"; a total norm goes with all others
        rule = self.rule(options)
        check_rule(replace(rule, norms=tuple("frobenius" if norm == "spectral" else norm for norm in rule.norms)))

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        check_state_dtype(param, group)

    def fallback_scale(self, group: Mapping[str, Any]) -> float:
        scale: float = group["scale"]
        return scale

    def new_matrix_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return new_momentum(param, group) if group["momentum"] else {}

    def rule(self, group: Mapping[str, Any]) -> NormRule:
        """Return what the options of a group ask for."""
        return NormRule(
            norms=tuple(group["norms"]) * group["iterations"],
            scale=group["scale"],
            eps=group["eps"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            momentum_after=group["momentum_after"],
            conv=group["stacks"] == "conv",
        )

    def takes_pieces_of_matrices(self, bucket: Bucket) -> bool:
        flat = bucket.group["stacks"] != "conv" or bucket.params[0].ndim == 2
        return flat and "spectral" not in bucket.group["norms"] and bucket.pieces() is not None

    def update_matrices(self, bucket: Bucket) -> None:
        group = bucket.group
        arguments = {
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "rule": self.rule(group),
            **bucket.options(),
        }
        params, grads, steps = bucket.params, bucket.grads, bucket.state("step")
        if "spectral" in group["norms"]:
            whitening = WhiteningRule(
                solver=group["solver"],
                iterations=group["solver_iterations"],
                beta=group["beta"],
                conv=group["stacks"] == "conv",
            )
            spectral_update_(params, grads, steps, whitening=whitening, **arguments)
        else:
            exp_avgs = bucket.state("exp_avg") if group["momentum"] else None
            sinkhorn_update_(params, grads, steps, exp_avgs=exp_avgs, pieces=bucket.pieces(), **arguments)


NORMS = ("row", "col", "frobenius", "sign", "spectral")


def check_norms(norms: Any) -> None:
    """Raise ValueError unless ``norms`` is a tuple or list of at least one of NORMS."""
    if not isinstance(norms, (tuple, list)) or not norms or not all(norm in NORMS for norm in norms):
        allowed = ", ".join(map(repr, NORMS))
        raise ValueError(f"norms is {norms!r}; allowed: a tuple of at least one of {allowed}")
