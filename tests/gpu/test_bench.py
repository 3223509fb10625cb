"""`lowmem bench` on a real GPU: what a CPU leaves blank is there, and copying is not beaten by more than chance."""

import csv

import torch
from typer.testing import CliRunner

from lowmem_optim.cli import app, timing


def test_host_time_launches_and_rates(tmp_path):
    arguments = ["bench", "--model", "llama-60m", "--layers", "1", "--rounds", "5", "--device", "cuda"]
    result = CliRunner().invoke(
        app, [*arguments, "-o", "adamw", "-o", "came", "--out", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "llama-60m-bf16.csv").open(newline="") as file:
        lines = {line["contender"]: line for line in csv.DictReader(file)}
    assert {"AdamW", "AdamW, to nearest", "CAME", "CAME, to nearest", "torch.AdamW(fused)"} <= lines.keys()
    timed = {name: line for name, line in lines.items() if not line["left_out"]}
    for name, line in timed.items():
        assert float(line["host_us"]) > 0
        assert int(line["launches"]) > 0 or name == "copy"  # which the driver does
        assert int(line["extra_bytes"]) >= 0
    # the kernels' own launches, and few on top: step counters and what is uploaded
    assert int(lines["AdamW"]["launches"]) <= 3
    assert int(lines["CAME"]["launches"]) <= 10
    if "came_pytorch.CAME" in timed:  # where it is installed
        assert int(lines["came_pytorch.CAME"]["launches"]) > 100
    assert 10 < float(lines["AdamW"]["percent_of_copy"]) < 120


def test_a_step_that_waits_for_the_device_takes_the_host_as_long():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    stopwatch = timing.Stopwatch(device)
    waits = stopwatch(lambda: (a @ a).sum().item())
    returns = stopwatch(lambda: a @ a)
    assert waits.host >= waits.step > 0
    assert returns.host < waits.host
