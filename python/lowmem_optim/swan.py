"""SWAN: gradient descent with the rows of a gradient standardized and its singular values made equal; no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.whitening import WhiteningRule, whiten_
from lowmem_kernels.whitening.rule import SOLVERS

from .buckets import Bucket
from .checks import check_choice, check_integer, check_number
from .routed import RoutedOptimizer, RoutedOptions


class SWAN(RoutedOptimizer):
    """SWAN, which needs no state for matrices.

    For a matrix g of n rows and m columns:

    ``X_ij = (g_ij - mean_i) / std_i`` over each row, ``D = (X X^T)^(-1/2) X``, ``D = sqrt(n m) D / |D|``,
    ``p -= lr (scale D + weight_decay p)``

    All that is no matrix gets the fallback, see RoutedOptions; in the paper embeddings and the output layer do too,
    which takes the groups of `split_params`. D does not depend on the gradient's scale: clipping and loss scaling
    change nothing.

    Args:
        params: parameters, (name, parameter) pairs or groups such as `split_params` makes; float32, bfloat16, float16.
        lr: step length, in units of the parameter for an update of RMS 1, before ``scale``.
        iterations: of the solver, >= 1; None: 10 of "coupled", 5 of "polynomial".
        beta: step length of "coupled", in (0, 1]: 0.5 converges to the inverse root, 0.8, the paper's, does not, and
            lifts small singular values sooner.
        solver: "coupled", the paper's, in full float32, or "polynomial", Muon's, cheaper and with TF32 where there is.
        scale: factor of the update, >= 0, but not of the decay. The fallback's rate is lr * scale.
        weight_decay: decoupled, multiplied by lr; not in the paper.
        center: False divides rows by their RMS without centring them: `MNGD` with ``("row", "spectral")``, once.
        **options: see RoutedOptions.

    State: ``step`` and ``uid``. The fallback's own. Memory in a step: square matrices of the shorter side, up to 256 MB
    at a time, or five of the largest.

    Source: Ma et al., arXiv 2412.13148, algorithms 1 and 2; the normalization of ``X X^T`` before the iteration, which
    diverges without, as in arXiv 2502.07752, appendix B.8; decay and scale are not in them.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        iterations: int | None = None,
        beta: float = 0.8,
        solver: str = "coupled",
        scale: float = 0.05,
        weight_decay: float = 0.0,
        *,
        center: bool = True,
        **options: Unpack[RoutedOptions],
    ) -> None:
        own = {
            "lr": lr,
            "iterations": iterations,
            "beta": beta,
            "solver": solver,
            "scale": scale,
            "weight_decay": weight_decay,
            "center": center,
        }
        super().__init__(params, own, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        check_solver(options, "iterations")
        check_number("scale", options["scale"])
        check_number("weight_decay", options["weight_decay"])
        check_choice("center", options["center"], (True, False))

    def fallback_scale(self, group: Mapping[str, Any]) -> float:
        scale: float = group["scale"]
        return scale

    def new_matrix_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}

    def update_matrices(self, bucket: Bucket) -> None:
        group = bucket.group
        whiten_(
            bucket.params,
            bucket.grads,
            bucket.state("step"),
            lr=group["lr"],
            scale=group["scale"],
            weight_decay=group["weight_decay"],
            rule=WhiteningRule(
                normalize="gradnorm" if group["center"] else "row",
                solver=group["solver"],
                iterations=group["iterations"],
                beta=group["beta"],
                conv=group["stacks"] == "conv",
            ),
            **bucket.options(),
        )


def check_solver(options: Mapping[str, Any], iterations: str) -> None:
    """Raise ValueError unless solver, beta and the option called ``iterations`` are allowed."""
    check_choice("solver", options["solver"], SOLVERS)
    check_number("beta", options["beta"], positive=True)
    if options["beta"] > 1:
        raise ValueError(f"beta is {options['beta']!r}; allowed: a number > 0 and <= 1")
    if options[iterations] is not None:
        check_integer(iterations, options[iterations])
