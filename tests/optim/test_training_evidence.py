"""The sections of `make gpu-evidence` that train: what fits is found, and what fails is said and stops nothing."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from lowmem_optim.cli import registry
from lowmem_optim.cli.data import load_text
from lowmem_optim.cli.plan_memory import Setting, plan

BENCH = Path(__file__).parent.parent.parent / "bench"
TOTAL = 10**9
# older versions of transformers, which GPU images have, know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture
def script(monkeypatch):
    """Imports a script as Python would run it, with its folder in the path."""

    def load(name):
        for path in (BENCH, BENCH / "evidence"):
            monkeypatch.syspath_prepend(str(path))
        return importlib.import_module(name)

    return load


# headline


@pytest.fixture
def trainer(script):
    """Makes trainers of the dry run's model, on a CPU."""
    headline, child = script("headline"), script("headline_run")
    from transformers import LlamaConfig

    def make(configuration):
        options = configuration.options | configuration.live_options
        choice = registry.find(configuration.optimizer)
        config = LlamaConfig(**headline.configuration_of(headline.DRY_ARCHITECTURE))
        return child.Trainer(config, choice, options, configuration.fused, torch.device("cpu"))

    return make


def test_planned_bytes_are_those_of_live_tensors(script, monkeypatch, trainer):
    """Within a hundredth, as docs/planning.md says, for every configuration; the model is that of transformers."""
    headline, child = script("headline"), script("headline_run")
    monkeypatch.setattr(child, "ROUNDS", 1)
    model = headline.model_of(headline.DRY_ARCHITECTURE)
    for configuration in headline.CONFIGURATIONS:
        record, made = child.Record(), trainer(configuration)
        child.measure_one(made, headline.DRY_SEQUENCE, None, record)
        expected = headline.planned(model, configuration, headline.DRY_SEQUENCE)
        found = {f"planned_{part}": getattr(record, part) for part in ("parameters", "gradients", "state")}
        assert {part: expected[part] for part in found} == pytest.approx(found, rel=0.01), configuration.title
        assert record.status == "ran"
        assert record.one.peak_bytes > record.parameters + record.state
        names = {name: param.shape for name, param in model.module.named_parameters()}
        assert {name: param.shape for name, param in made.model.named_parameters()} == names
        assert made.model.is_gradient_checkpointing


def test_layers_are_those_asked_for(script):
    headline = script("headline")
    seven = headline.replace(headline.MODELS["llama-7b"], layers=4)
    row = headline.planned(headline.model_of(seven), headline.CONFIGURATIONS[0], 2048)
    rows = plan(headline.model_of(seven), [registry.find("torch.AdamW")], {}, Setting(torch.bfloat16, 1, 2048, True))
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert row["planned_parameters"] == 2 * (4 * layer + 2 * 32000 * 4096 + 4096)
    assert row["planned_total"] == rows[0].total


def test_without_updates_nothing_moves_and_no_gradient_stays(script, trainer):
    headline = script("headline")
    made = trainer(headline.Configuration("Lomo", "Lomo", {}, fused=True))
    before = [param.detach().clone() for param in made.params]
    with made.without_updates():
        made.step(1, headline.DRY_SEQUENCE)
        assert all(param.grad is None for param in made.params)
    assert all(torch.equal(old, new) for old, new in zip(before, made.params, strict=True))
    made.optimizer.param_groups[0]["lr"] = 1.0
    made.step(1, headline.DRY_SEQUENCE)
    assert not any(torch.equal(old, new) for old, new in zip(before[:1], made.params, strict=False))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["AdaLomo", "APOLLO", "SinkGD"])
def test_memory_that_ends_in_the_middle_of_a_backward_pass(script, trainer, name, fused):
    """The next step is one as any other: all parameters move, and no gradient is left."""
    headline = script("headline")
    made = trainer(headline.Configuration(name, name, {}, fused=fused))
    made.step(1, headline.DRY_SEQUENCE)

    def ends(grad):
        raise torch.OutOfMemoryError("none left")

    hook = made.params[len(made.params) // 2].register_hook(ends)
    with pytest.raises(torch.OutOfMemoryError):
        made.step(1, headline.DRY_SEQUENCE)
    hook.remove()
    made.resume()
    assert all(param.grad is None for param in made.params)
    for group in made.optimizer.param_groups:
        group["lr"] = 0.1
    before = [param.detach().clone() for param in made.params]
    made.step(1, headline.DRY_SEQUENCE)
    assert not any(torch.equal(old, new) for old, new in zip(before, made.params, strict=True))
    assert all(param.grad is None for param in made.params)


class Pretended:
    """Has a peak that grows with the batch as it should: first while there are gradients, then with activations."""

    device, fused = torch.device("cpu"), True

    def __init__(self, monkeypatch, child, peak, limit=TOTAL):
        self.tried = []

        def attempt(trainer, batch, sequence, memory):
            self.tried.append(batch)
            if peak(batch) > limit:
                raise torch.OutOfMemoryError
            return child.Attempt(batch, int(peak(batch)), None, 1e3 * batch, None, 1.0)

        monkeypatch.setattr(child, "attempt", attempt)
        monkeypatch.setattr(child, "give_back", lambda device: None)

    def resume(self):
        pass


#: Sequences of 10 MB planned: as planned, a tenth more or less, and a peak that is elsewhere at small batches.
PEAKS = {
    "as planned": lambda batch: 2e8 + 1e7 * batch,
    "more than planned": lambda batch: 2e8 + 1.1e7 * batch,
    "less than planned": lambda batch: 2e8 + 0.9e7 * batch,
    "gradients at first": lambda batch: max(6e8 + 1e6 * batch, 2e8 + 1e7 * batch),
}


@pytest.mark.parametrize("peak", PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("gaps", [0.0, 0.03])
def test_the_largest_batch_is_found_in_a_few_attempts(script, monkeypatch, peak, gaps):
    """With memory in gaps there is less than it seems."""
    child = script("headline_run")
    limit = TOTAL * (1 - gaps)
    pretended = Pretended(monkeypatch, child, peak, limit)
    record = child.Record(one=child.Attempt(1, int(peak(1)), None, 1.0, None, 1.0))
    child.search(pretended, 2048, None, TOTAL, 10**7, time.time() + 1e6, record, lambda: None)
    largest = max(batch for batch in range(1, 200) if peak(batch) <= limit)
    assert record.largest.batch == largest
    assert record.least_too_many == largest + 1
    assert len(pretended.tried) <= 9


def test_no_attempt_begins_that_would_end_too_late(script, monkeypatch):
    child = script("headline_run")
    pretended = Pretended(monkeypatch, child, PEAKS["as planned"])
    record = child.Record(one=child.Attempt(1, int(2.1e8), None, 1e3, None, 1.0))
    # 80 sequences would take 80 s
    child.search(pretended, 2048, None, TOTAL, 10**7, time.time() + 70, record, lambda: None)
    assert pretended.tried == []
    assert (record.largest.batch, record.least_too_many) == (1, None)


def test_what_does_not_fit_is_a_result(script, tmp_path):
    headline, child = script("headline"), script("headline_run")
    file, out = tmp_path / "config.json", tmp_path / "record.json"
    file.write_text(json.dumps(headline.configuration_of(headline.DRY_ARCHITECTURE)))
    child.main(file, out, "AdamW", time.time(), 1, sequence=32, memory=headline.DRY_MEMORY, device="cpu")
    record = json.loads(out.read_text())
    assert (record["status"], record["one"], record["largest"]) == ("does not fit", None, None)
    # that the plan says so, too
    model = headline.model_of(headline.DRY_ARCHITECTURE)
    assert headline.planned(model, headline.Configuration("", "AdamW"), 32)["planned_total"] > headline.DRY_MEMORY


def test_errors_that_are_not_about_memory_are_raised_again(script):
    child = script("headline_run")
    child.check_memory(torch.OutOfMemoryError("1 GB"))
    child.check_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    with pytest.raises(RuntimeError, match="shapes"):
        child.check_memory(RuntimeError("shapes"))


CHILD = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
known = {"parameters": 7, "one": {"peak_bytes": 9}}
kind = sys.argv[sys.argv.index("--optimizer") + 1]
if kind == "AdamW":
    os.kill(os.getpid(), 11)
json.dump({"status": "does not fit" if kind == "Lomo" else "ran", **known}, open(out, "w"))
if kind == "SinkGD":
    time.sleep(60)
if kind == "APOLLO":
    1 / 0
"""


def test_what_goes_wrong_is_reported_and_stops_nothing(script, monkeypatch, tmp_path):
    headline = script("headline")
    (tmp_path / "headline_run.py").write_text(CHILD)
    names = ["AdamW", "Lomo", "SinkGD", "APOLLO", "AdaLomo"]
    monkeypatch.setattr(headline, "EVIDENCE", tmp_path)
    monkeypatch.setattr(headline, "LATE", 1.0)
    monkeypatch.setattr(headline, "DRY_CONFIGURATIONS", [headline.Configuration(name, name) for name in names])
    with pytest.raises(RuntimeError, match=r"^AdamW, ordinary; SinkGD, ordinary; APOLLO, ordinary: see"):
        headline.main(tmp_path, seconds=15.0, dry_run=True)
    rows = {row["optimizer"]: row for row in json.loads((tmp_path / "headline.json").read_text())["rows"]}
    assert [rows[name]["status"] for name in names] == ["failed", "does not fit", "failed", "failed", "ran"]
    assert rows["AdamW"]["reason"].startswith("exit code -11")
    assert rows["SinkGD"]["reason"].startswith("not done after")
    assert "ZeroDivisionError" in rows["APOLLO"]["reason"]
    # what was known by then stays, and the plan is there in any case
    assert [rows[name]["parameters"] for name in names] == [None, 7, 7, 7, 7]
    assert all(rows[name]["planned_total"] > 0 for name in names)
    table = (tmp_path / "headline.md").read_text()
    assert "| Lomo | ordinary | 0.00 does not fit | " in table
    assert "failed: exit code -11" in table


# training


def test_recipes_are_what_lowmem_train_takes(script, monkeypatch):
    """All options go through the command's own parsing; of 60 M parameters, the widths of Llama 60M."""
    training = script("training")
    from lowmem_optim.cli.settings import training_of

    text = BENCH / "evidence"
    taken = {}
    for recipe in training.RECIPES:
        words = training.train_command(recipe, 100, training.MODEL, text, "cpu", text)[4:]
        pairs = [word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word]
        given = {name.replace("-", "_"): value for name, value in pairs}
        opts = [words[i + 1] for i, word in enumerate(words) if word == "--opt"]
        sweep = [words[i + 1] for i, word in enumerate(words) if word == "--sweep"]
        numbers = ("layers", "dim", "context", "batch_size", "steps", "warmup", "eval_every", "eval_batches")
        arguments = {
            **{"optimizer": recipe.optimizer, "compare": None, "backend": "auto", "fused_backward": False, "nproc": 1},
            **{"sharding": None, **given, "opt": opts, "sweep": sweep, "data": text},
            **{name: int(given[name]) for name in (*numbers, "log_every", "checkpoint_every", "seed")},
            **{name: float(given[name]) for name in ("lr", "weight_decay", "clip_grad_norm", "final_lr")},
        }
        found = training_of(arguments)
        assert [dict(choice.swept) for choice in found.choices] == [
            {"stochastic_rounding": True},
            {"stochastic_rounding": False},
        ]
        for choice in found.choices:
            module = torch.nn.Linear(8, 8, device="meta", dtype=torch.bfloat16)
            optimizer = choice.build(module, recipe.lr, found.config.options)
            group = optimizer.param_groups[0]
            assert (group["lr"], group["weight_decay"]) == (recipe.lr, 0)
        taken[recipe.optimizer] = found.config
    assert {config.model.parameters for config in taken.values()} == {60_362_240}
    assert (taken["AdamW"].model.dim, taken["AdamW"].model.hidden) == (512, 1376)
    assert taken["APOLLO"].options["rank"] == 128
    assert all(recipe.source for recipe in training.RECIPES)


def test_steps_are_as_many_as_fit(script):
    training = script("training")
    assert training.steps_in(500.0, 15.0, 0.05, 7) == 410
    assert 7 * 15 + 14 * training.MARGIN * 410 * 0.05 <= 500
    assert training.steps_in(500.0, 15.0, 1e-3, 7) == training.MOST_STEPS
    assert training.steps_in(50.0, 15.0, 1.0, 7) == training.LEAST_STEPS


def test_links_to_python_files_are_a_text(script, tmp_path):
    script("training").corpus(tmp_path / "text", Path(torch.__file__).parent / "optim")
    text = load_text(tmp_path / "text", 512)
    files = [*(Path(torch.__file__).parent / "optim").rglob("*.py")]
    assert text.files == len([file for file in files if file.stat().st_size]) > 10
    assert len(text.training) + len(text.validation) == sum(file.stat().st_size for file in files)


#: Stands for `lowmem train`: writes a record of one run and a checkpoint, and may fail before or after.
TRAIN = """
import json, pathlib, sys
name, steps, out = sys.argv[1:]
if name == "Adafactor":
    1 / 0
run = {"optimizer": name, "status": "diverged", "training_loss": [1.0, 2.0], "tokens_per_step": 8, "parameters": 5}
run |= {"settings": {"stochastic_rounding": "True"}, "step_ms": [500.0, 50.0, 50.0], "wall_seconds": 1.0}
run |= {"figures": {"step_ms": 3.0}, "validation_loss": [[1, 2.5]], "steps": steps}
folder = pathlib.Path(out)
(folder / "step-2").mkdir(parents=True)
(folder / "record.json").write_text(json.dumps({"runs": [run]}))
if name == "SinkGD":
    1 / 0
"""


def test_a_training_that_fails_is_reported_and_stops_nothing(script, monkeypatch, tmp_path):
    training = script("training")
    asked = {}

    def command(recipe, steps, model, text, device, out, trial=False):
        asked["trial" if trial else recipe.optimizer] = steps
        return (sys.executable, "-c", TRAIN, recipe.optimizer, str(steps), str(out))

    names = ["AdamW", "Adafactor", "SinkGD", "AdaPM"]
    monkeypatch.setattr(training, "train_command", command)
    monkeypatch.setattr(training, "corpus", lambda folder, root: None)
    monkeypatch.setattr(training, "environment", lambda device: {})
    monkeypatch.setattr(training, "RECIPES", [training.Recipe(name, 1.0, "here") for name in names])
    with pytest.raises(RuntimeError, match=r"^AdamW, Adafactor, SinkGD, AdaPM: see"):
        training.main(tmp_path, seconds=100.0)
    record = json.loads((tmp_path / "training.json").read_text())
    # 8 runs with a step of 50 ms and a margin of 0.35, less what processes take beside
    assert 100 < record["steps"] <= 180
    assert asked == {"trial": training.TRIAL_STEPS, **dict.fromkeys(names, record["steps"])}
    rows = {(row["optimizer"], row["stochastic_rounding"]): row for row in record["rows"]}
    assert [key[0] for key in rows] == [name for name in names for _ in range(2)]
    assert {rows["Adafactor", rounding]["status"] for rounding in ("True", "False")} == {"failed"}
    assert "ZeroDivisionError" in rows["Adafactor", "True"]["reason"]
    for name in ("AdamW", "SinkGD", "AdaPM"):
        row = rows[name, "True"]
        assert (row["status"], row["reason"], row["steps"], row["tokens"]) == ("diverged", "", 2, 16)
        assert rows[name, "False"]["status"] == "failed"
    assert "ZeroDivisionError" in rows["SinkGD", "False"]["reason"]
    assert rows["AdaPM", "False"]["reason"] == "no record"
    assert [path.name for path in (tmp_path / "training" / "AdamW").iterdir()] == ["record.json"]


def test_what_was_interrupted_says_why_and_keeps_its_figures(script):
    training = script("training")
    run = {"settings": {"stochastic_rounding": "True"}, "status": "interrupted", "training_loss": [1.0]}
    run |= {"tokens_per_step": 8, "parameters": 5, "wall_seconds": 1.0, "figures": {"step_ms": 3.0}}
    first, second = training.rows_of(training.RECIPES[0], [run], "not done after 9 s")
    assert (first["status"], first["reason"], first["step_ms"]) == ("interrupted", "not done after 9 s", 3.0)
    assert (second["status"], second["reason"], second["step_ms"]) == ("failed", "not done after 9 s", None)


def test_without_time_left_no_training_begins(script, monkeypatch, tmp_path):
    training = script("training")
    monkeypatch.setattr(training, "corpus", lambda folder, root: None)
    monkeypatch.setattr(training, "environment", lambda device: {})
    with pytest.raises(RuntimeError, match=r"^AdamW, .*AdaPM: see"):
        training.main(tmp_path, steps=100, seconds=20.0)
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", "no time left of 20 s")}
    assert len(rows) == 2 * len(training.RECIPES)
    assert [*(tmp_path / "training").iterdir()] == []


def test_a_trial_that_fails_says_why(script, monkeypatch, tmp_path):
    training = script("training")
    monkeypatch.setattr(training, "train_command", lambda *_, **__: (sys.executable, "-c", "1 / 0"))
    monkeypatch.setattr(training, "corpus", lambda folder, root: None)
    with pytest.raises(RuntimeError, match="the trial with AdamW failed, exit code 1: ZeroDivisionError"):
        training.main(tmp_path, seconds=100.0)


def test_what_takes_too_long_may_end_by_itself(script, tmp_path):
    """`lowmem train` writes what it has when it gets SIGTERM."""
    running = script("running")
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), sys.exit(0)))
print("ready", flush=True)
time.sleep(60)
"""
    section = running.Section("slow", "", (sys.executable, "-c", code), 0)
    outcome = running.run_section(section, tmp_path, 3.0, inside=True, grace=10.0)
    assert (outcome.status, outcome.reason) == ("failed", "not done after 3 s")
    assert (tmp_path / "slow.log").read_text().endswith("ready\nasked to stop\n")


# memcheck


def test_every_optimizer_steps_over_the_shapes_of_memcheck(script, capsys):
    memcheck = script("memcheck")
    memcheck.check("cpu", time.monotonic() + 60)
    done = [line.removeprefix("done: ") for line in capsys.readouterr().out.splitlines()]
    assert done[-1] == "SWAN"
    assert set(done) == {choice.name for choice in registry.choices().values() if choice.can_fuse} - {"MNGD"}
    memcheck.check("cpu", time.monotonic() - 1)
    assert capsys.readouterr().out.splitlines()[-1] == "no time for SWAN"
