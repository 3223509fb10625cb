"""torch.optim.Adafactor's rule. Compared in float32 only: in bfloat16 torch keeps its second moments in bfloat16."""

import torch

from lowmem_kernels.testing.oracles import torch_adafactor
from lowmem_optim import TorchAdafactor
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_COMMON, factors
from optim.tensors import LAYOUTS


def peer(foreach):
    """Torch divides by the number of elements, so that there has to be one."""
    return Peer(
        "torch-foreach" if foreach else "torch-loop",
        lambda groups: torch.optim.Adafactor(groups, foreach=foreach),
        layouts=tuple(name for name in LAYOUTS if name != "empty"),
    )


CASES = [
    OptimizerCase(
        name="torch-adafactor",
        optimizer=TorchAdafactor,
        options={"lr": 2e-2, "weight_decay": 0.1},
        # an lr above 1/sqrt(t) after 4 steps, and an eps1 that many elements of V are below
        other_options={"lr": 0.5, "eps": (0.7, 0.5), "d": 2.0, "beta2_decay": -0.5},
        oracle=torch_adafactor,
        state=lambda shape, dtype: factors(shape),
        wrong=[
            *WRONG_COMMON,
            ("d", 0.0),
            ("d", -1.0),
            ("beta2_decay", 0.8),
            ("beta2_decay", None),
            ("foreach", 1),
        ],
        peers=[peer(foreach=False), peer(foreach=True)],
        elementwise=False,
    )
]
