"""torch.optim.Adafactor's rule. Compared in float32 only: in bfloat16 torch keeps its second moments in bfloat16."""

import numpy as np
import torch

from lowmem_optim import TorchAdafactor
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_COMMON, SecondMoment, clipped, factors, rms
from optim.tensors import LAYOUTS


def oracle(params, grads, options):
    """As torch's documentation has it, with its note: eps1 is squared under the root, and sums are means."""
    params = list(params)
    moments = [SecondMoment(p.shape) for p in params]
    for t in range(1, len(grads) + 1):
        for i, (g, o) in enumerate(zip(grads[t - 1], options[t - 1], strict=True)):
            o = {"eps": (None, 1e-3), "beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.0, **o}
            eps1 = 2.0**-23 if o["eps"][0] is None else o["eps"][0]
            alpha = max(o["eps"][1], rms(params[i])) * min(o["lr"], 1 / np.sqrt(t))
            params[i] = params[i] - o["lr"] * o["weight_decay"] * params[i]
            moments[i].move(g**2, t ** o["beta2_decay"])
            u = g / np.maximum(np.sqrt(moments[i].estimate(floor=eps1)), eps1)
            params[i] = params[i] - alpha * clipped(u, o["d"])
    return params, [moment.state() for moment in moments]


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
        oracle=oracle,
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
