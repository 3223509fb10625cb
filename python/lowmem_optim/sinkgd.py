"""SinkGD: gradient descent with rows and columns of the gradient normalized in turns, as Sinkhorn's algorithm does."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .mngd import MNGD
from .routed import RoutedOptions


class SinkGD(MNGD):
    """SinkGD, which is `MNGD` with the norms of rows and of columns: no state for matrices.

    For a matrix g of n rows and m columns, X = g, and then ``iterations`` times

    ``X_ij = sqrt(m) X_ij / |X_i.|``, then ``X_ij = sqrt(n) X_ij / |X_.j|``

    ``p -= lr (scale X + weight_decay p)``. All that is no matrix gets the fallback, see RoutedOptions; in the paper
    embeddings and the output layer do too, which takes the groups of `split_params`.

    Args:
        params: parameters, (name, parameter) pairs or groups such as `split_params` makes; float32, bfloat16, float16.
        lr: step length, in units of the parameter for an update of RMS 1, before ``scale``.
        iterations: of rows and columns, >= 1.
        scale: factor of the update, >= 0, but not of the decay. The fallback's rate is lr * scale.
        weight_decay: decoupled, multiplied by lr; not in the paper.
        momentum, nesterov, momentum_after, eps, state_dtype: as in `MNGD`; not in the paper.
        **options: see RoutedOptions.

    State: as `MNGD`.

    Source: arXiv 2502.06742, algorithms 3 and 4.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        iterations: int = 5,
        scale: float = 0.05,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        momentum_after: bool = False,
        eps: float | None = None,
        state_dtype: str = "fp32",
        **options: Unpack[RoutedOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            ("row", "col"),
            iterations,
            scale,
            weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            momentum_after=momentum_after,
            eps=eps,
            state_dtype=state_dtype,
            **options,
        )
