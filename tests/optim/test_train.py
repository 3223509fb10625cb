"""`lowmem train` from end to end, on a model small enough for a few steps to take no time."""

import json
import math
import re
from itertools import count

import pytest
import torch
from typer.testing import CliRunner

from lowmem_optim.cli import app
from lowmem_optim.cli.defaults import DEFAULTS, Default
from lowmem_optim.cli.files import json_of
from lowmem_optim.cli.progress import Display
from lowmem_optim.cli.settings import FILE

TINY = [
    *("--layers", "1", "--dim", "32", "--context", "16", "--batch-size", "2", "--device", "cpu"),
    *("--steps", "3", "--eval-every", "2", "--eval-batches", "1"),
]
PAIR = ["--optimizer", "torch.AdamW", "--compare", "torch.SGD"]


@pytest.fixture
def train(tmp_path, text):
    """Runs the command on a small text; returns its result and its record, None where it wrote none."""

    def run(*arguments, out="run"):
        # a folder that is in use is refused
        folder = next(path for path in (tmp_path / (out + "-again" * n) for n in count()) if not (path / FILE).exists())
        result = CliRunner().invoke(app, ["train", *TINY, "--data", str(text), "--out", str(folder), *arguments])
        record = folder / "record.json"
        return result, json.loads(record.read_text()) if record.exists() else None

    return run


def words(output):
    """The output without boxes and line breaks, which depend on the terminal's width."""
    return " ".join(output.replace("│", " ").split())


def test_comparison_writes_table_plot_and_record(train, tmp_path):
    result, record = train(*PAIR)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "nats/byte above torch.AdamW" in (tmp_path / "run" / "table.md").read_text()
    assert "torch.SGD step 3/3 loss" in words(result.output)

    adamw, sgd = record["runs"]
    for run in (adamw, sgd):
        assert run["status"] == "finished"
        assert len(run["training_loss"]) == len(run["step_ms"]) == len(run["optimizer_ms"]) == 3
        assert [step for step, _ in run["validation_loss"]] == [2, 3]
        assert run["figures"]["validation_loss"] == run["validation_loss"][-1][1]
    assert adamw["training_loss"][0] == sgd["training_loss"][0]
    assert adamw["training_loss"][1:] != sgd["training_loss"][1:]
    assert adamw["figures"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)
    assert sgd["figures"]["state_bytes_per_parameter"] == 0
    difference = sgd["figures"]["validation_loss"] - adamw["figures"]["validation_loss"]
    assert sgd["figures"]["loss_above_baseline"] == difference
    assert record["environment"]["torch"] == torch.__version__
    assert record["text"]["training_bytes"] > record["text"]["validation_bytes"] > 0


def test_equal_seeds_train_equally(train):
    losses = [train("-o", "torch.AdamW", "--seed", seed)[1]["runs"][0]["training_loss"] for seed in ("7", "7", "8")]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_naming_one_optimizer_trains_it_alone(train):
    result, record = train("-o", "torch.SGD")
    assert [run["optimizer"] for run in record["runs"]] == ["torch.SGD"]
    assert "above" not in result.output


def test_naming_none_trains_the_four_that_the_help_names(train):
    _, record = train()
    assert [run["optimizer"] for run in record["runs"]] == ["AdamW", "AdaLomo", "Adafactor", "SinkGD"]
    output = words(CliRunner().invoke(app, ["train", "--help"]).output)
    assert "[default: (adalomo, adafactor, sinkgd, unless -o is given)]" in output


def test_options_reach_the_optimizer_and_the_record(train):
    _, record = train(*PAIR, "--opt", "momentum=0.9", "--weight-decay", "0.5", "--lr", "0.125")
    assert record["config"]["options"] == {"momentum": 0.9, "weight_decay": 0.5}
    assert [(run["lr"], run["lr_source"]) for run in record["runs"]] == [(0.125, "--lr")] * 2
    assert record["runs"][1]["figures"]["state_bytes_per_parameter"] == 4  # momentum


def test_rules_for_matrices_with_their_fallback(train):
    """torch clips the gradients of those that do not clip, and lr schedules act on the fallback too."""
    result, record = train("-o", "sinkgd", "-c", "mngd", "--opt", "norms=('row',)", "--opt", "fallback=adafactor")
    assert result.exit_code == 0, result.output
    sinkgd, mngd = record["runs"]
    assert sinkgd["training_loss"][0] == mngd["training_loss"][0]
    assert sinkgd["training_loss"][1:] != mngd["training_loss"][1:]
    assert max(run["figures"]["state_bytes_per_parameter"] for run in record["runs"]) < 0.5


def test_fused_backward(train, tmp_path):
    """The loss is that of ordinary steps to the last bit where nothing is clipped; fewer gradients are alive."""
    options = ["-o", "adalomo", "-c", "torch.SGD", "--clip-grad-norm", "0"]
    result, record = train(*options, "--fused-backward")
    assert result.exit_code == 0, result.output
    assert "AdaLomo (fused)" in (tmp_path / "run" / "table.md").read_text()
    _, plain = train(*options, out="plain")
    (fused, sgd), (ordinary, _) = record["runs"], plain["runs"]
    assert fused["training_loss"] == ordinary["training_loss"]
    assert [run["fused"] for run in (fused, sgd, ordinary)] == [True, False, False]
    assert sgd["gradient_bytes"] == ordinary["gradient_bytes"] == 4 * fused["parameters"]
    assert 0 < fused["gradient_bytes"] < 0.6 * ordinary["gradient_bytes"]
    assert fused["figures"]["gradient_mib"] == fused["gradient_bytes"] / 2**20
    # a bound on the norm is that of the running norm
    _, clipped = train("-o", "lomo", "--fused-backward", "--clip-grad-norm", "0.1", out="clipped")
    assert clipped["runs"][0]["status"] == "finished"


def test_bfloat16(train):
    result, record = train(*PAIR, "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert record["runs"][0]["figures"]["state_bytes_per_parameter"] == pytest.approx(4, abs=0.1)


def test_all_diverged(train):
    result, record = train(*PAIR, "--lr", "1e30", "--steps", "20")
    assert result.exit_code == 1, result.output
    assert record["diverged"] == ["torch.AdamW", "torch.SGD"]
    assert all(len(run["training_loss"]) < 20 for run in record["runs"])
    assert "torch.SGD diverged: its loss is not finite after" in words(result.output)


def test_one_diverged(train, tmp_path, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "AdamW", Default(1e30, "too high"))
    result, record = train(*PAIR)
    assert result.exit_code == 0, result.output
    assert [run["status"] for run in record["runs"]] == ["diverged", "finished"]
    assert record["runs"][0]["figures"]["validation_loss"] is None
    assert "torch.AdamW (diverged)" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize("steps", [0, 2])
def test_interruption_keeps_what_was_measured(train, tmp_path, monkeypatch, steps):
    def show_until_interrupted(self, run):
        if len(run.training_loss) >= steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "show", show_until_interrupted)
    result, record = train(*PAIR)
    assert result.exit_code == 130, result.output
    assert record["interrupted"]
    (run,) = record["runs"]
    assert run["status"] == "interrupted"
    assert len(run["training_loss"]) == max(steps, 1)
    assert (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "torch.adamv"], "'--optimizer': no optimizer is named 'torch.adamv'; did you mean"),
        (["-c", "torch.sdg", "-o", "torch.sgd"], "'--compare': no optimizer is named 'torch.sdg'; did you mean"),
        (["--opt", "momentun=1"], "'--opt': 'momentun' is not an argument of torch.SGD; did you mean momentum?"),
        (["--opt", "momentum=-1"], "momentum=-1): Invalid momentum value"),
        (["--backend", "torch"], "'--backend': 'backend' is not an argument of torch.SGD"),
        (["--fused-backward"], "'--fused-backward': torch.SGD cannot; name one of this package"),
        (["-o", "lomo", "--fused-backward", "--opt", "skip_nonfinite=step"], "Lomo: skip_nonfinite is 'step'"),
        (["--dim", "100"], "'--dim': 100 is not a multiple of 32"),
        (["--sweep", "lr=1"], "'--sweep': 'lr=1' is not of the form key=value,value with several values"),
        (["--sweep", "lr=1,"], "'--sweep': 'lr=1,' is not of the form key=value,value with several values"),
        (["--sweep", "lr=1e-3,2e-3,0.001"], "'lr=1e-3,2e-3,0.001' has 0.001 a second time; allowed: each once"),
        (["--sweep", "lr=1,2", "--sweep", "lr=3,4"], "'lr=3,4' has lr a second time; allowed: each once"),
        (["--sweep", "lr=1,2", "--lr", "1"], "'--sweep': 'lr' has one value already, by --lr"),
        (["--sweep", "momentum=0,0.9", "--opt", "momentum=0"], "'momentum' has one value already, by --opt"),
        (["--sweep", "betas=1,2"], "'--sweep': 'betas' is not an argument of torch.SGD"),
        (["-o", "lomo", "--sweep", "clip_grad_norm=1,2"], "'clip_grad_norm' is the same for all; allowed: lr,"),
        (["--sweep", "momentum=-1,0.5"], "momentum=-1): Invalid momentum value"),
        (["--schedule", "cosin"], "'cosin' is not one of 'cosine', 'linear', 'constant', 'wsd'"),
        (["--final-lr", "1.5"], "'--final-lr': "),
        (["-c", "torch.sgd", "-o", "torch.sgd"], "'--compare': torch.SGD is there twice"),
        (["--warmup", "4"], "'--warmup': 4 is more than --steps 3"),
        (["--device", "tpu"], "'--device': 'tpu' is not available; this machine has cpu"),
        (["--data", "nowhere"], "'--data': nowhere does not exist"),
        (["--context", "5000"], "too little text"),
        (["--steps", "0"], "'--steps':"),
        (["--dtype", "fp8"], "'fp8' is not one of 'fp32', 'bf16'"),
    ],
)
def test_bad_arguments_are_named_before_any_training(train, arguments, message):
    result, record = train(*([] if "-o" in arguments else ["-o", "torch.SGD"]), *arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result.output)
    assert "step 1/3" not in result.output
    assert record is None


def test_output_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "taken").touch()
    result, _ = train("-o", "torch.SGD", out="taken")
    assert result.exit_code == 2
    assert "'--out': cannot make the folder" in words(result.output)


def test_a_folder_in_use_is_refused(train, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / FILE).write_text("{}")
    result = CliRunner().invoke(app, ["train", *TINY, "-o", "torch.SGD", "--out", str(tmp_path / "taken")])
    assert result.exit_code == 2
    assert "'--out': there is a training in" in words(result.output)
    assert (tmp_path / "taken" / FILE).read_text() == "{}"


def test_a_folder_in_that_of_the_text_is_refused(train, tmp_path):
    """Its logs would be text that was not there when the training began."""
    result, record = train("-o", "torch.SGD", "--data", str(tmp_path))
    assert result.exit_code == 2
    assert "'--out': " in words(result.output)
    assert "all of whose files are the text; allowed: a folder elsewhere" in words(result.output)
    assert record is None


def test_what_json_does_not_know(train):
    """Numbers that are not finite are null."""
    result, record = train("-o", "torch.SGD", "--lr", "inf", "--clip-grad-norm", "inf")
    assert result.exit_code == 1, result.output
    assert record["config"]["lr"] is record["config"]["clip_grad_norm"] is record["runs"][0]["lr"] is None
    assert json.loads(json_of({"a": {1}, (2, 3): (math.nan, 1j)})) == {"a": "{1}", "(2, 3)": [None, "1j"]}


def test_defaults_say_where_they_are_from():
    output = words(CliRunner().invoke(app, ["train", "--defaults"], terminal_width=200).output)
    assert "AdaLomo 0.05 validation loss on the default task: 0.02 1.728, 0.05 1.667, 0.1 1.804" in output
    assert "torch.Rprop 0.01 the constructor's default; not tried on the default task" in output


def test_sweep_of_one_argument(train, tmp_path):
    """Optimizers by values; the comparison is that of the best of each."""
    result, record = train(*PAIR, "--sweep", "lr=1e-4,1e-2,1e30", "--steps", "4", "--schedule", "constant")
    assert result.exit_code == 0, result.output
    runs = {(run["optimizer"], run["settings"]["lr"]): run for run in record["runs"]}
    assert [key for key in runs] == [
        (o, lr) for o in ("torch.AdamW", "torch.SGD") for lr in ("0.0001", "0.01", "1e+30")
    ]
    assert [run["lr_source"] for run in record["runs"]] == ["--sweep"] * 6
    assert {lr for (_, lr), run in runs.items() if run["status"] == "diverged"} == {"1e+30"}
    table = (tmp_path / "run" / "table.md").read_text()
    assert not re.match(r"[\w ]+:", table)  # which readers of Markdown take for metadata
    losses = [runs["torch.SGD", lr]["figures"]["validation_loss"] for lr in ("0.0001", "0.01")]
    assert losses[1] < losses[0]  # so that the mark can be wrong
    assert f"| torch.SGD | {losses[0]:.4f} | **{losses[1]:.4f}** | diverged |" in " ".join(table.split())
    assert "| torch.AdamW lr=0.01 | torch.SGD lr=0.01 |" in " ".join(table.split())
    assert (tmp_path / "run" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_of_words(train):
    result, record = train("-o", "sinkgd", "--sweep", "fallback=adamw,adafactor")
    assert result.exit_code == 0, result.output
    assert [run["settings"]["fallback"] for run in record["runs"]] == ["adamw", "adafactor"]
    first, second = (run["training_loss"] for run in record["runs"])
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_sweep_of_two_arguments_equals_single_runs(train, tmp_path):
    _, record = train("-o", "torch.SGD", "--sweep", "lr=0.1,0.2", "--sweep", "momentum=0,0.9")
    pairs = [("0.1", "0"), ("0.1", "0.9"), ("0.2", "0"), ("0.2", "0.9")]
    assert [tuple(run["settings"].values()) for run in record["runs"]] == pairs
    _, single = train("-o", "torch.SGD", "--lr", "0.2", "--opt", "momentum=0.9")
    assert record["runs"][3]["training_loss"] == single["runs"][0]["training_loss"]
    assert len({tuple(run["training_loss"]) for run in record["runs"]}) == 4
    assert "| lr / momentum | 0 | 0.9 |" in " ".join((tmp_path / "run" / "table.md").read_text().split())
