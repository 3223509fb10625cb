"""bench/nsight/kernel_bytes.py on a table written by hand in the format of `ncu --csv`: no ncu has run here."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
CSV = Path(__file__).parent / "ncu_raw.csv"
RANGE = "factored_update_ bfloat16 1 of 1000x1000"
FORMULA = {"ranges": [RANGE], "steps": 2, "elements": 1_000_000, "least_bytes": 8_000_000}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kernel_bytes", ROOT / "bench" / "nsight" / "kernel_bytes.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up the module they are in
    sys.modules["kernel_bytes"] = module
    spec.loader.exec_module(module)
    return module


def details(lines):
    """The same launches as a row for each metric."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    header, units, *launches = rows
    table = [[*header[:-3], "Section Name", "Metric Name", "Metric Unit", "Metric Value"]]
    for launch in launches:
        for metric, unit, value in zip(header[-3:], units[-3:], launch[-3:], strict=True):
            table.append([*launch[:-3], "Command line profiler metrics", metric, unit, value])
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in table]
    return ["==PROF== Connected", *quoted]


@pytest.mark.parametrize("page", ["raw", "details"])
def test_both_pages_of_ncu(script, page):
    lines = CSV.read_text().splitlines()
    launches = script.read_launches(lines if page == "raw" else details(lines))
    assert [launch.kernel for launch in launches] == ["_factored_kernel"] * 4 + ["at::native::fill(int, float *)"]
    assert [launch.range for launch in launches] == [RANGE] * 4 + [""]
    assert launches[0].nbytes == {
        "dram__bytes_read.sum": 2_000_000,
        "dram__bytes_write.sum": 40_500,
        "lts__t_bytes.sum": 4_100_000,
    }


def test_a_step_against_the_formula(script):
    launches = script.read_launches(CSV.read_text().splitlines())
    kernel, fill, total = script.against_formula(script.moved_in_a_step(launches, steps=2), FORMULA)
    assert (kernel["launches"], kernel["read"], kernel["written"]) == (2, 6_000_000, 2_040_000)
    assert kernel["dram_per_element"] == 8.04
    assert kernel["l2_per_element"] == 10.1
    assert (fill["range"], fill["dram"]) == ("", 32)
    # what is outside the ranges is not the step's
    assert (total["kernel"], total["launches"], total["dram"]) == ("all", 2, 8_040_000)
    assert total["times_least"] == 1.005


def test_the_command_writes_json(script, tmp_path):
    formula, out = tmp_path / "formula.json", tmp_path / "bytes.json"
    formula.write_text(json.dumps(FORMULA))
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, [str(CSV), "--formula", str(formula), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())[-1]["times_least"] == 1.005


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Kernel Name", "Kernel", "no line of column names"),
        ("lts__t_bytes.sum", "lts__t_sectors.sum", "has no lts__t_bytes.sum"),
        ('"4,000,000"', '"n/a"', "'n/a', not a number"),
        ('"Kbyte"', '"sector"', "dram__bytes_write.sum is in 'sector'"),
        ('"","","","","","","","","","","","","","byte","Kbyte","byte"\n', "", "it has the units"),
    ],
)
def test_what_is_not_such_a_table_is_refused(script, old, new, message):
    text = CSV.read_text()
    assert old in text
    with pytest.raises(ValueError, match=message):
        script.read_launches(text.replace(old, new).splitlines())
