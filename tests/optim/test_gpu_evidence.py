"""`make gpu-evidence` on a CPU: everything that it runs runs, and what fails, hangs or cannot run is said to."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

REPO = Path(__file__).parent.parent.parent
BENCH = REPO / "bench"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as Python would run it, with its folder in the path."""

    def load(name):
        folder = (BENCH / name).parent
        for path in (BENCH, folder):
            monkeypatch.syspath_prepend(str(path))
        return importlib.import_module(Path(name).stem)

    return load


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_dry_run_leaves_everything_in_its_folder(tmp_path):
    command = [sys.executable, str(BENCH / "gpu_evidence.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs

    record = json.loads((tmp_path / "summary.json").read_text())
    statuses = {section["name"]: section["status"] for section in record["sections"]}
    ran = ("tests", "ceilings", "orders", "bench-llama-7b", "host", "headline", "training")
    assert statuses == {**dict.fromkeys(ran, "passed"), "counters": "skipped", "memcheck": "skipped"}
    assert {"torch", "triton", "git_commit", "device", "gpu", "command"} <= record["circumstances"].keys()
    summary = (tmp_path / "summary.md").read_text()
    assert "7 passed, 0 failed, 2 skipped" in summary
    assert "| skipped | " in summary
    assert "a dry run has no counters" in summary
    assert "python bench/evidence/orders.py" in summary
    assert str(REPO) not in summary
    for name in statuses:
        assert f"[{name}]({name}.log)" in summary
        assert (tmp_path / f"{name}.log").read_text().startswith("$ python bench/")

    assert set(json.loads((tmp_path / "tests.json").read_text()).values()) == {"passed"}
    ceilings = json.loads((tmp_path / "ceilings.json").read_text())
    assert ceilings["copy_gb_per_s"] > 0
    assert ceilings["bf16_matmul_tflop_per_s"] > 0
    assert ceilings["read_gb_per_s_by_working_set_mb"]["1"] > 0
    orders = rows(tmp_path / "orders.csv")
    assert {row["order"] for row in orders} >= {"planned", "phased", "forward", "ahead 0", "ahead doubled"}
    assert [row["phased"] for row in orders if row["order"].startswith("phased")] == ["True", "True"]
    assert [float(row["times_faster_than_phased"]) for row in orders if row["order"] == "phased"] == [1.0]
    assert all(float(row["ms_20"]) <= float(row["ms_50"]) <= float(row["ms_80"]) for row in orders)
    bench = [row["contender"] for row in rows(tmp_path / "llama-7b-bf16.csv")]
    assert bench == ["copy", "torch.AdamW(fused)", "AdamW", "Lomo"]
    host = json.loads((tmp_path / "host_cost.json").read_text())["figures"]["optimizers"]["Lomo"]
    assert host["launches"] == 1
    assert all(0 < host[kind]["least_us"] <= host[kind]["median_us"] for kind in ("same_place", "new_places"))
    check_headline(tmp_path)
    check_training(tmp_path)


def check_headline(folder):
    """The planned bytes are the live ones within the hundredth that docs/planning.md states."""
    record = json.loads((folder / "headline.json").read_text())
    (row,) = record["rows"]
    assert (row["optimizer"], row["mode"], row["status"]) == ("AdaLomo", "fused", "ran")
    for part in ("parameters", "gradients", "state"):
        assert row[f"planned_{part}"] == pytest.approx(row[part], rel=0.01)
    assert row["parameters"] + row["state"] < row["peak_bytes"] < row["largest_peak_bytes"] <= record["memory"]
    assert row["largest_batch"] > 1
    assert row["least_too_many"] == row["largest_batch"] + 1
    assert row["tokens_per_s"] == pytest.approx(record["sequence"] / row["step_ms"] * 1e3)
    assert rows(folder / "headline.csv")[0]["peak_bytes"] == str(row["peak_bytes"])
    assert f"| {row['largest_batch']} | " in (folder / "headline.md").read_text()
    assert (folder / "headline.png").stat().st_size > 10_000


def check_training(folder):
    found = rows(folder / "training.csv")
    assert [(row["optimizer"], row["stochastic_rounding"]) for row in found] == [
        ("AdaLomo", "True"),
        ("AdaLomo", "False"),
    ]
    curves = rows(folder / "curves.csv")
    for row in found:
        assert (row["status"], row["steps"], float(row["lr"])) == ("finished", "4", 0.05)
        own = [each for each in curves if each["stochastic_rounding"] == row["stochastic_rounding"]]
        assert [int(each["tokens"]) for each in own] == [32, 64, 96, 128]
        assert own[-1]["validation_loss"] == row["validation_loss"]
        assert float(row["optimizer_ms"]) < float(row["step_ms"])
    # equal up to the first update, and rounding is the only difference
    assert curves[3]["validation_loss"] != curves[7]["validation_loss"]
    assert float(curves[3]["validation_loss"]) == pytest.approx(float(curves[7]["validation_loss"]), rel=1e-2)
    kept = {path.name for path in (folder / "training" / "AdaLomo").iterdir()}
    assert kept == {"record.json", "table.md", "loss.png", "sweep.png", "settings.json"}


def sections_that(script, *codes, seconds=60.0):
    """Sections named 0, 1, ... that run Python code."""
    section = script("gpu_evidence.py").Section
    return [section(str(i), "a test", (sys.executable, "-c", code), seconds) for i, code in enumerate(codes)]


def test_what_goes_wrong_stops_nothing_else(script, tmp_path):
    evidence = script("gpu_evidence.py")
    fails = "raise RuntimeError('no such luck | today')"
    skips = "print('nothing to see'); raise SystemExit(77)"
    crashes = "import os; os.kill(os.getpid(), 11)"
    chosen = sections_that(script, fails, skips, crashes, "print('done')")
    chosen += sections_that(script, "import time; print('waiting', flush=True); time.sleep(100)", seconds=2.0)
    said = []
    outcomes = evidence.run_all(chosen, tmp_path, 60.0, said.append)
    assert [outcome.status for outcome in outcomes] == ["failed", "skipped", "failed", "passed", "failed"]
    assert "RuntimeError: no such luck | today" in outcomes[0].reason
    assert outcomes[1].reason == "nothing to see"
    assert outcomes[2].reason.startswith("exit code -11")
    assert outcomes[4].reason == "not done after 2 s"
    assert len(said) == 5
    summary = (tmp_path / "summary.md").read_text()
    assert "1 passed, 3 failed, 1 skipped" in summary
    assert r"no such luck \| today" in summary
    # the log of a section that was ended has what it had printed
    assert "waiting" in (tmp_path / "0.log").read_text()


def test_a_traceback_is_in_the_log(script, tmp_path):
    script("gpu_evidence.py").run_all(sections_that(script, "1 / 0"), tmp_path, 60.0, print)
    assert "ZeroDivisionError" in (tmp_path / "0.log").read_text()


def test_a_section_that_hangs_takes_its_processes_along(script, tmp_path):
    """A child that goes on would keep the device busy."""
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    waits = f"import os, time; time.sleep(2.5); print(os.path.exists({str(alive)!r}))"
    chosen = [*sections_that(script, parent, seconds=0.7), *sections_that(script, "", waits)[1:]]
    outcomes = script("gpu_evidence.py").run_all(chosen, tmp_path, 60.0, print)
    assert [outcome.status for outcome in outcomes] == ["failed", "passed"]
    assert "False" in (tmp_path / "1.log").read_text()


def test_without_time_left_sections_are_skipped(script, tmp_path):
    outcomes = script("gpu_evidence.py").run_all(sections_that(script, "1 / 0"), tmp_path, 1.0, print)
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("skipped", "no time left of 1 s")]


@pytest.mark.parametrize(("code", "exit_code"), [("", 0), ("raise SystemExit(77)", 0), ("1 / 0", 1)])
def test_exit_code(script, monkeypatch, tmp_path, code, exit_code):
    evidence = script("gpu_evidence.py")
    monkeypatch.setattr(evidence, "sections", lambda out, dry_run: sections_that(script, code))
    app = typer.Typer()
    app.command()(evidence.main)
    result = CliRunner().invoke(app, ["--dry-run", "--out", str(tmp_path)])
    assert result.exit_code == exit_code, result.output


def test_on_a_gpu_all_sections_run_within_their_limits(script):
    evidence = script("gpu_evidence.py")
    names = [section.name for section in evidence.sections(Path("out"), dry_run=False)]
    assert names[0] == "tests"
    assert {"ceilings", "compile", "orders", "bench-gpt2", "bench-llama-1b", "bench-llama-7b"} < set(names)
    assert evidence.TOTAL_SECONDS < 540
    alone = [section for section in evidence.sections(Path("out"), dry_run=False) if section.alone]
    assert [section.name for section in alone] == ["headline", "training"]
    # a call of its own for each, which ends by itself before it is ended
    assert all(evidence.WORK_SECONDS < section.seconds < evidence.TOTAL_SECONDS for section in alone)
    assert all("--seconds" in section.command for section in alone)


def test_what_takes_a_call_of_its_own_runs_only_where_it_is_named(script, monkeypatch, tmp_path):
    evidence = script("gpu_evidence.py")
    section = script("evidence/running.py").Section
    both = [section(name, "", (sys.executable, "-c", ""), 9.0, name == "long") for name in ("short", "long")]
    monkeypatch.setattr(evidence, "sections", lambda out, dry_run: both)
    monkeypatch.setattr(evidence.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evidence, "circumstances", lambda: {"device": "none"})
    app = typer.Typer()
    app.command()(evidence.main)
    for arguments, expected in (([], ["short"]), (["--only", "long"], ["long"])):
        result = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "summary.json").read_text())
        assert [each["name"] for each in record["sections"]] == expected


def test_outcomes_of_tests_are_read_from_what_pytest_prints(script):
    outcome = script("evidence/gpu_tests.py").OUTCOME
    text = """
tests/gpu/test_a.py::test_one[a-b, c] PASSED                              [ 10%]
tests/gpu/test_a.py::test_two[4 x 4] FAILED                               [ 20%]
FAILED tests/gpu/test_a.py::test_two[4 x 4] - AssertionError: x::y PASSED by
tests/gpu/test_a.py::test_three """
    assert outcome.findall(text) == [
        ("tests/gpu/test_a.py::test_one[a-b, c]", "PASSED"),
        ("tests/gpu/test_a.py::test_two[4 x 4]", "FAILED"),
    ]
