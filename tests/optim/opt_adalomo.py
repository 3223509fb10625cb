"""AdaLomo: 2310.10195, with the square root, eps1 and decay rate of the package lomo-optim, which is its peer."""

from unittest import mock

import torch
from lomo_optim import AdaLomo as Package
from torch import nn

from lowmem_kernels.testing.oracles import adalomo
from lowmem_optim import AdaLomo
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_CLIP, WRONG_COMMON, WRONG_RATE, factors, scaled_by_parameter


class OfPackage(torch.optim.Optimizer):
    """lomo_optim.AdaLomo, which updates in hooks of the backward pass and knows one lr, as an optimizer with groups."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1.0})
        self.parts = []
        for group in self.param_groups:
            options = {k: v for k, v in group.items() if k not in ("params", "lr", "clip_grad_norm", "clip_grad_value")}
            # it puts its state on a GPU, whatever the parameters are on
            with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
                self.parts.append(Package(nn.ParameterList(group["params"]), loss_scale=None, **options))

    def step(self):
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.lr = group["lr"]
            part.step_num += 1
            part.grad_func(None)


def clip_before(params):
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    torch.nn.utils.clip_grad_value_(params, MAX_VALUE)
    for param in params:
        param.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))


#: as in opt_lomo.py: some steps' norms are larger, and some elements
MAX_NORM = 25.0
MAX_VALUE = 0.7
#: the package allocates states of shape[0] and shape[1] elements, so that it takes vectors and matrices only
LAYOUTS = ("vector", "matrix", "one_row", "one_column", "transposed", "strided")

CASES = [
    OptimizerCase(
        name="adalomo",
        optimizer=AdaLomo,
        options={"lr": 1e-2, "weight_decay": 0.1, "clip_grad_norm": MAX_NORM, "clip_grad_value": MAX_VALUE},
        other_options={"lr": 3e-3, "eps": (1e-2, 2.0), "clip_threshold": 0.6, "decay_rate": -0.5},
        oracle=adalomo,
        state=lambda shape, dtype: factors(shape),
        wrong=[
            *WRONG_COMMON,
            *WRONG_CLIP,
            *WRONG_RATE,
            ("clip_grad_norm", 0.0),
            ("clip_grad_norm", -1.0),
            ("clip_grad_value", float("inf")),
            ("clip_grad_value", "1"),
        ],
        peers=[
            Peer("lomo-optim", OfPackage, before_step=clip_before, layouts=LAYOUTS),
            # as in opt_adafactor.py: the package rounds once, too; without clipping, which here would round gradients
            Peer(
                "lomo-optim-bf16",
                OfPackage,
                torch.bfloat16,
                {"stochastic_rounding": False, "clip_grad_norm": None, "clip_grad_value": None},
                unknown=frozenset({"stochastic_rounding"}),
                mismatches=0.002,
                layouts=LAYOUTS,
            ),
        ],
        couples_parameters=True,
        bounds_elements=True,
        elementwise=False,
        decay=scaled_by_parameter,
    )
]
