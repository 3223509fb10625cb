"""`lowmem bench` from end to end on a model of a few thousand parameters, and the arithmetic of its figures."""

import csv
import re
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lowmem_kernels.testing.models import MODELS, Architecture, model_shapes, parameter_count
from lowmem_optim.cli import app, bench_rows, contenders, measure, timing
from lowmem_optim.cli.bench_rows import Row, Workload
from optim.cases import exported

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model that takes no time, a small cache, no collection of garbage, and the threads that were."""
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    monkeypatch.setitem(MODELS, "tiny", Architecture(64, 32, 48, 2, 4, 2))
    monkeypatch.setattr(timing, "_cpu_cache_bytes", lambda: 2**16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path):
    """Runs the command; returns its result and the lines of its CSV by contender, None where it wrote none."""

    def run(*arguments, dtype="fp32"):
        options = ["--model", "tiny", "--rounds", "4", "--device", "cpu", "--dtype", dtype, "--out", str(tmp_path)]
        result = CliRunner().invoke(app, ["bench", *options, *arguments])
        table = tmp_path / f"tiny-{dtype}.csv"
        if not table.exists():
            return result, None
        with table.open(newline="") as file:
            return result, {line["contender"]: line for line in csv.DictReader(file)}

    return run


def words(output):
    """The output without boxes, colours and line breaks, which depend on the terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", output).replace("│", " ").split())


def number(text):
    """A cell of the CSV."""
    return float(text) if text else None


def test_csv_and_plot(bench, tmp_path):
    plot = tmp_path / "deep" / "plot.png"
    result, lines = bench("-o", "adamw", "-o", "CAME", "--plot", str(plot), dtype="bf16")
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")

    others = ["torch.AdamW(fused)", "came_pytorch.CAME"]
    ours = ["AdamW", "AdamW, to nearest", "CAME", "CAME, to nearest"]
    assert list(lines) == ["copy", *others, *ours]
    count = parameter_count(model_shapes("tiny"))
    copy = lines["copy"]
    assert float(copy["least_bytes"]) == 2 * 2 * count
    for name, line in lines.items():
        low, median, high = (float(line[f"ms_{percent}"]) for percent in (20, 50, 80))
        assert 0 < low <= median <= high
        assert line["kind"] == ("copy" if name == "copy" else "other" if name in others else "ours")
        assert line["host_us"] == line["launches"] == line["left_out"] == ""  # not separable on a CPU
        for other in ("copy", *others):
            ratio = float(lines[other]["ms_50"]) / median
            assert float(line[f"times_faster_than {other}"]) == pytest.approx(ratio)
        if name != "came_pytorch.CAME":  # nobody counted its bytes
            rate = float(line["least_bytes"]) / median / 1e6
            assert float(line["gb_per_s"]) == pytest.approx(rate)
            assert float(line["percent_of_copy"]) == pytest.approx(100 * rate / float(copy["gb_per_s"]))
            assert float(line["least_bytes_per_parameter"]) == pytest.approx(float(line["least_bytes"]) / count)
        assert int(line["parameters"]) == count
        assert (line["tensors"], line["layers"], line["dtype"], line["rounds"]) == ("21", "2", "bf16", "4")
        assert line["torch"] == torch.__version__
        assert line["device"]
    unknown = lines["came_pytorch.CAME"]
    assert unknown["least_bytes"] == unknown["gb_per_s"] == unknown["percent_of_copy"] == ""
    assert int(lines["AdamW"]["state_bytes"]) >= 8 * count
    assert int(lines["torch.AdamW(fused)"]["state_bytes"]) < 5 * count
    assert set(bench_rows.COLUMNS) <= copy.keys()


def test_the_command_in_the_csv_is_the_one_to_repeat(bench):
    _, lines = bench("-o", "Lomo", "--layers", "1")
    assert list(lines) == ["copy", "torch.SGD(fused)", "Lomo"]
    line = lines["Lomo"]
    expected = "lowmem bench --model tiny --dtype fp32 --device cpu --rounds 4 --threads 1 --layers 1 --optimizer Lomo"
    assert line["command"] == expected
    assert int(line["parameters"]) == parameter_count(model_shapes("tiny", 1))


def test_all_run_by_default_and_none_changes_the_gradients(monkeypatch):
    monkeypatch.setattr(contenders, "MOST_TENSORS_TO_COMPILE", 0)
    own = contenders.ours([], torch.float32)
    # MNGD is SinkGD unless told otherwise
    assert {contender.name for contender in own} == exported().keys() - {"MNGD"}
    everyone = [*contenders.others(own), *own]
    assert len(everyone) == len(own) + len(contenders.OTHERS)
    made = []
    original = bench_rows.make_tensors
    monkeypatch.setattr(bench_rows, "make_tensors", lambda *a: made.append(original(*a)) or made[0])
    work = Workload(model_shapes("tiny"), torch.float32, CPU, 2)
    done = []
    rows = bench_rows.run(work, everyone, lambda _, steps: done.append(steps))
    # galore_torch needs bitsandbytes, which is not among what tests install
    absent = [other.name for other in contenders.OTHERS if other.compiled or find_spec(other.package) is None]
    assert [row.contender for row in rows if row.left_out] == absent
    assert sum(done) == bench_rows.total_steps(everyone, 2) - 2 * len(absent)
    for before, after in zip(original(work.shapes, work.dtype, CPU), made[0], strict=True):
        assert all(map(torch.equal, before, after))


def test_what_cannot_run_is_left_out_and_says_why(bench, monkeypatch):
    find_spec, which = contenders.find_spec, contenders.shutil.which
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None if "++" in name or not name else which(name))
    result, lines = bench("-o", "adafactor", "--layers", "1")
    assert result.exit_code == 0, result.output
    assert lines["transformers.Adafactor"]["left_out"] == "transformers is not installed"
    assert "left out: transformers.Adafactor: transformers is not installed" in words(result.output)
    assert "C++ compiler" in lines["torch.Adafactor(compiled)"]["left_out"]
    for name in ("transformers.Adafactor", "torch.Adafactor(compiled)"):
        assert lines[name]["ms_50"] == ""
        assert f"times_faster_than {name}" not in lines["Adafactor"]
    assert number(lines["Adafactor"]["times_faster_than torch.Adafactor"]) > 0


def test_compiling_many_tensors_is_left_out():
    compiled = next(other for other in contenders.OTHERS if other.compiled)
    assert "291 tensors" in compiled.why_not(model_shapes("llama-7b"), torch.device("cuda"))
    assert compiled.why_not(model_shapes("llama-7b", 1), torch.device("cuda")) is None


def test_a_failure_of_others_is_a_reason_and_one_of_ours_an_error():
    def fails(params):
        raise RuntimeError("no such luck\nwith details")

    work = Workload(model_shapes("tiny", 1), torch.float32, CPU, 1)
    other = contenders.Contender("other", fails, ("AdamW",))
    row = bench_rows.run(work, [other], lambda *_: None)[1]
    assert row.left_out == "its first step failed: no such luck"
    with pytest.raises(RuntimeError, match="no such luck"):
        bench_rows.run(work, [contenders.Contender("ours", fails)], lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "lama-7b"), "Invalid value for '--model': model is 'lama-7b'; did you mean"),
        (("--layers", "3"), "Invalid value for '--layers': layers is 3; this model allows 1 to 2"),
        (
            ("--optimizer", "torch.SGD"),
            "'--optimizer': 'torch.SGD' is not an optimizer of this package; allowed: APOLLO",
        ),
        (("--device", "cuda:99"), "Invalid value for '--device': 'cuda:99' is not available; this machine has cpu"),
        (("--dtype", "fp8"), "'fp8' is not one of 'fp32', 'bf16'"),
        (("--rounds", "0"), "Invalid value for '--rounds': "),
        (("--threads", "0"), "Invalid value for '--threads': "),
        (("--out", "{file}"), "Invalid value for '--out': cannot make the folder"),
        (("--plot", "{folder}"), "Invalid value for '--plot': {folder} is a folder; a file is needed"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    result = CliRunner().invoke(
        app, ["bench", "--model", "tiny", "--device", "cpu", *given], env={"COLUMNS": "300", "TERM": "dumb"}
    )
    assert result.exit_code == 2
    assert message.format(**places) in words(result.output)


def test_help_names_every_model():
    output = words(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "300"}).output)
    assert not [name for name in MODELS if name != "tiny" and name not in output]


def test_arithmetic_of_a_row():
    copy = Row("copy", "copy", ms=(1.0, 2.0, 3.0), least_bytes=8_000_000)
    ours = Row("AdamW", "ours", ms=(4.0, 8.0, 9.0), least_bytes=16_000_000, host_us=20.0)
    unknown = Row("other", "other", ms=(10.0, 16.0, 20.0))
    gone = Row("gone", "other", left_out="because")
    assert (copy.gb_per_s, ours.gb_per_s, unknown.gb_per_s) == (4.0, 2.0, None)
    figures = bench_rows.figures(ours, [copy, unknown, gone, ours], 1_000_000)
    assert figures["percent_of_copy"] == 50
    assert figures["least_bytes_per_parameter"] == 16
    assert figures["times_faster_than other"] == 2
    assert figures["times_faster_than copy"] == 0.25
    assert "times_faster_than gone" not in figures
    assert (figures["ms_20"], figures["ms_50"], figures["ms_80"]) == ours.ms


@pytest.mark.parametrize(
    ("name", "bf16", "fp32", "vector"),
    [
        ("AdamW", 22, 28, 22),
        ("Lomo", 6, 12, 6),
        ("Adafactor", 8, 16, 20),
        ("TorchAdafactor", 8, 16, 20),
        ("AdaLomo", 8, 16, 20),
        ("CAME", 20, 28, 32),
        ("AdaPM", 18, 28, 22),
        ("AdamMini", 14, 20, 14),
    ],
)
def test_least_bytes_are_those_of_the_readme(name, bf16, fp32, vector):
    moved = contenders.MOVED[name]
    assert moved.least({"a": (64, 32), "b": (2, 8, 4)}, 2) == bf16 * (64 * 32 + 2 * 8 * 4)
    assert moved.least({"a": (64, 32)}, 4) == fp32 * 64 * 32
    assert moved.least({"a": (100,)}, 2) == vector * 100
    # what SWAN takes is arithmetic, and tiles that programs share
    assert contenders.MOVED.keys() == exported().keys() - {"SWAN"}


@pytest.mark.parametrize("name", ["SinkGD", "MNGD"])
def test_least_bytes_where_only_matrices_get_the_rule(name):
    """By default more than two dimensions get the fallback, as vectors do."""
    moved = contenders.MOVED[name]
    assert moved.least({"a": (64, 32)}, 2) == 16 * 64 * 32
    assert moved.least({"a": (64, 32)}, 4) == 32 * 64 * 32
    assert moved.least({"a": (2, 8, 4), "b": (100,)}, 2) == 22 * (2 * 8 * 4 + 100)


def test_steps_take_turns_after_one_that_does_not_count():
    order, advanced = [], []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(steps, 3, timing.Stopwatch(CPU), advanced.append)
    assert order == list("ab") * 4
    assert advanced == list("ab") * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_caches_are_overwritten_before_a_step_and_not_timed(monkeypatch):
    torch.set_num_threads(1)
    stopwatch = timing.Stopwatch(CPU)
    assert stopwatch._buffer.nbytes >= 2 * 2**16
    stopwatch._buffer.fill_(1)
    ticks = iter((10.0, 10.25))
    monkeypatch.setattr(stopwatch, "_clock", lambda: next(ticks))
    seen = []
    seconds = stopwatch(lambda: seen.append(int(stopwatch._buffer.sum())))
    assert seen == [0]
    assert seconds == (0.25, None)


def test_on_a_gpu_a_step_is_timed_by_events_behind_the_flushes(monkeypatch):
    """The order of what is submitted, with a stand-in for the device."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, after):
            return 2.5

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100))
    monkeypatch.setattr(torch, "empty", lambda size, **_: Buffer() if size == 200 else None)
    seconds = timing.Stopwatch(torch.device("cuda", 0))(lambda: log.append("step"))
    assert log == ["wait", *["flush"] * timing.HEAD_START, "event", "step", "event", "wait"]
    assert seconds.step == 2.5e-3
    assert 0 < seconds.host < 1


def test_one_thread_is_timed_by_its_own_clock():
    torch.set_num_threads(1)
    assert timing.Stopwatch(CPU)._clock is timing.time.thread_time
    torch.set_num_threads(2)
    assert timing.Stopwatch(CPU)._clock is timing.time.perf_counter
