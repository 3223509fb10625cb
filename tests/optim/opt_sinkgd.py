"""SinkGD: 2502.06742, algorithms 3 and 4, with decay, momentum, and each of the fallbacks."""

from lowmem_kernels.testing.oracles import sinkgd
from lowmem_optim import SinkGD
from optim.cases import OptimizerCase
from optim.multinorm import OTHER, WRONG, decay, state, with_ratio

CASES = [
    OptimizerCase(
        name="sinkgd",
        optimizer=SinkGD,
        options={"lr": 2e-2, "scale": 0.5, "weight_decay": 0.1},
        other_options={**OTHER, "iterations": 1, "scale": 2.0, "fallback_betas": (0.8, 0.95), "fallback_eps": 1e-3},
        oracle=with_ratio(sinkgd),
        state=state("adamw"),
        wrong=WRONG,
        elementwise=False,
        fallback_elementwise=True,
        decay=decay(0.5),
    ),
    OptimizerCase(
        name="sinkgd-nesterov-batched-adafactor",
        optimizer=SinkGD,
        options={
            "lr": 1e-2,
            "iterations": 1,
            "scale": 0.5,
            "weight_decay": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "state_dtype": "param",
            "stacks": "batched",
            "fallback": "adafactor",
        },
        other_options={**OTHER, "momentum": 0.5, "nesterov": False, "iterations": 2},
        oracle=with_ratio(sinkgd),
        state=state("adafactor", momentum="param", stacks="batched"),
        wrong=WRONG,
        refuses_float16=True,
        elementwise=False,
        fallback_elementwise=False,
        decay=decay(0.5, "batched"),
    ),
    OptimizerCase(
        name="sinkgd-conv-table",
        optimizer=SinkGD,
        options={"lr": 1e-2, "scale": 2.0, "weight_decay": 0.1, "stacks": "conv", "fallback": "table"},
        other_options={**OTHER, "weight_decay": 0.0},
        oracle=with_ratio(sinkgd),
        state=state("table", stacks="conv"),
        wrong=WRONG,
        elementwise=False,
        fallback_elementwise=False,
        decay=decay(2.0, "conv"),
    ),
]
