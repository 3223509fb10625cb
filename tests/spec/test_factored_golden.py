"""What the published implementations print for two steps from the same numbers: oracle and reference say the same.

transformers 5.23 (Adafactor), torch 2.13 (Adafactor), lomo-optim 0.1.1 (AdaLomo) and came-pytorch 0.1.3, run in fp32.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import factored_oracles
from lowmem_kernels.factored import FactoredRule, confidence_update_, factored_update_

MATRIX = (
    [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]],
    [[[1e-3, -2e-3, 3e-3], [4e-3, 5e-3, -6e-3]], [[-1e-3, 1e-3, 2e-3], [0, -3e-3, 1e-3]]],
)
VECTOR = ([0.1, -0.2, 0.3], [[1e-3, -2e-3, 3e-3], [-1e-3, 1e-3, 2e-3]])

EPS32 = torch.finfo(torch.float32).eps
RELATIVE = FactoredRule(lr_schedule="rsqrt")
TORCH = FactoredRule(eps=(EPS32, 1e-3), eps_floor=True, lr_schedule="rsqrt", scale_decay=False)
CAME = dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip_threshold=1.0)


@dataclass
class Golden:
    start: tuple
    options: dict
    #: What is printed after two steps, by the name of the list.
    end: dict = field(default_factory=dict)


HF_END = [0.100709163, -0.19836095, 0.29184711, 0.395892709, 0.499105752, -0.597130537]
VECTOR_END = [0.099980019, -0.199258119, 0.29611063]
GOLDEN = {
    "transformers": Golden(
        MATRIX,
        dict(lr=1e-2, weight_decay=0.0, rule=RELATIVE),
        dict(
            params=HF_END, rows=[3.13506916e-06, 1.28395359e-05], cols=[3.905207e-06, 9.04368335e-06, 1.10130168e-05]
        ),
    ),
    "transformers_lr_decay": Golden(
        MATRIX,
        dict(lr=1e-3, weight_decay=0.1, rule=FactoredRule(scale_parameter=False)),
        dict(params=[0.100169428, -0.199543998, 0.297837973, 0.398865461, 0.499677539, -0.599145412]),
    ),
    "transformers_beta1": Golden(
        MATRIX,
        dict(lr=1e-3, weight_decay=0.0, rule=FactoredRule(scale_parameter=False, beta1=0.9)),
        dict(
            params=[0.099963285, -0.199873179, 0.299687177, 0.399799615, 0.4998869, -0.599839091],
            exp_avgs=[
                *(-2.51196052e-05, -3.21410844e-05, 1.98811002e-04, 9.49190435e-05, 1.21607027e-05, -6.37441553e-05)
            ],
        ),
    ),
    "torch": Golden(
        MATRIX, dict(lr=1e-2, weight_decay=0.0, rule=TORCH), dict(params=HF_END, rows=[None, 1.2839535e-05])
    ),
    "torch_decay": Golden(
        MATRIX,
        dict(lr=1e-2, weight_decay=0.1, rule=TORCH),
        dict(params=[0.100508526, -0.197962761, 0.291255623, 0.395097226, 0.498107135, -0.595934033]),
    ),
    "adalomo": Golden(
        MATRIX,
        dict(lr=1e-3, weight_decay=0.1, rule=FactoredRule()),
        dict(params=[0.100065686, -0.199822232, 0.299158365, 0.399558157, 0.499874145, -0.599667072]),
    ),
    "came": Golden(
        MATRIX,
        dict(weight_decay=0.01, **CAME),
        dict(
            params=[0.097002797, -0.188471422, 0.269906461, 0.377752632, 0.491156489, -0.585776389],
            rows=[6.66200073e-09, 2.89743358e-08],
            cols=[8.99150177e-09, 1.94855012e-08, 2.49775027e-08],
            exp_avgs=[-0.0660971701, -0.00393723557, 0.253794193, 0.0977675691, -0.0270341653, -0.0546299592],
            res_rows=[1.93196072e-04, 1.40366901e-04],
            res_cols=[1.3291408e-04, 1.87265745e-04, 1.80164614e-04],
        ),
    ),
    "transformers_vector": Golden(
        VECTOR, dict(lr=1e-2, weight_decay=0.0, rule=RELATIVE), dict(params=VECTOR_END)
    ),
    "torch_vector": Golden(VECTOR, dict(lr=1e-2, weight_decay=0.0, rule=TORCH), dict(params=VECTOR_END)),
    "came_vector": Golden(
        VECTOR, dict(weight_decay=0.0, **CAME), dict(params=[0.099932, -0.199887171, 0.299714327])
    ),
}  # fmt: skip


def zeros(p):
    """States of a new run, but for exp_avgs: (rows, cols, res_rows, res_cols) as shapes."""
    return (p.shape[:-1], p.shape[-1:]) * 2 if p.ndim == 2 else (p.shape, None, None, None)


def by_oracle(golden):
    p, grads = np.array(golden.start[0]), np.array(golden.start[1], dtype=np.float64)
    row, col, res_row, res_col = (None if s is None else np.zeros(s) for s in zeros(p))
    new = {"params": p, "exp_avgs": 0 * p, "rows": row, "cols": col, "res_rows": res_row, "res_cols": res_col}
    for t, g in enumerate(grads, 1):
        p, m, row, col, *residuals = new.values()
        if "rule" in golden.options:
            new |= factored_oracles.factored(p, g, row, col, m, t, **golden.options)
        else:
            new |= factored_oracles.came(p, g, m, row, col, *residuals, **golden.options)
    return new


def by_reference(golden):
    p, step = torch.tensor(golden.start[0]), torch.tensor(0.0)
    row, col, res_row, res_col = (None if s is None else torch.zeros(s) for s in zeros(p))
    m = torch.zeros_like(p)
    for g in torch.tensor(golden.start[1]):
        if "rule" in golden.options:
            momentum = {} if golden.options["rule"].beta1 is None else {"exp_avgs": [m]}
            factored_update_([p], [g], [row], [col], [step], **momentum, **golden.options, backend="torch")
        else:
            lists = [[x] for x in (p, g, m, row, col, res_row, res_col, step)]
            confidence_update_(*lists, **golden.options, backend="torch")
    return {"params": p, "exp_avgs": m, "rows": row, "cols": col, "res_rows": res_row, "res_cols": res_col}


def digits(value):
    """A unit of the last of nine significant digits, which is what is printed at most."""
    return 10.0 ** (np.floor(np.log10(abs(value))) - 8)


@pytest.mark.parametrize("step", [by_oracle, by_reference], ids=["oracle", "reference"])
@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_printed_numbers(golden, step):
    """Two fp32 results of about 20 roundings each, and 0.5 of the last digit: 10 units of 2**-24 and one of a digit.

    CAME's residual is a difference: of a momentum and an update of about 1, it has their 10 units.
    """
    written = step(golden)
    for name, printed in golden.end.items():
        for value, expected in zip(np.asarray(written[name]).ravel(), printed, strict=True):
            if expected is not None:
                size = max(abs(expected), 1.0 if name == "exp_avgs" and "betas" in golden.options else 0.0)
                allowed = 10 * 2.0**-24 * size + digits(expected)
                assert abs(float(value) - expected) <= allowed, f"{name}: {value} is printed as {expected}"
