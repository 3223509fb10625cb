"""The probes of `lowmem doctor`: what they find of known optimizers, and of those that are broken on purpose."""

import re

import pytest
import torch
import transformers
from came_pytorch import CAME
from lomo_optim import AdaLomo, Lomo

import lowmem_optim
from lowmem_optim.conformance import PROBES, examine, find_rule
from lowmem_optim.conformance.recognize import recognize
from lowmem_optim.conformance.subject import Subject
from optim import broken
from optim.cases import exported


def verdicts(cls, against=None, **options):
    """{probe: verdict} of a class."""
    found = examine(Subject(cls.__name__, cls, options), against)
    return {verdict.probe: verdict for verdict in found}


def verdict(cls, probe):
    """One probe's."""
    subject = Subject(cls.__name__, cls)
    return PROBES[probe](subject, recognize(subject))


def wrong(found):
    return {name for name, verdict in found.items() if verdict.wrong}


@pytest.mark.parametrize("name", sorted(exported()))
def test_own_optimizers_are_their_rules_and_have_no_defect(name):
    found = verdicts(getattr(lowmem_optim, name))
    assert name in found["rule"].finding.split(" = ")
    assert set(found) == set(PROBES)
    assert wrong(found) == set()
    assert found["rank of update"].finding == "full"
    assert found["NaN gradient"].finding.endswith(" skipped")
    assert found["bfloat16 updates"].finding == "kept on average"


@pytest.mark.parametrize(
    ("cls", "options", "rule"),
    [
        (torch.optim.AdamW, {}, "AdamW"),
        (torch.optim.AdamW, {"fused": True}, "AdamW"),
        (torch.optim.AdamW, {"foreach": True, "betas": (0.8, 0.9), "eps": 1e-3}, "AdamW"),
        (torch.optim.Adam, {}, "Adam"),
        (lowmem_optim.AdamW, {"betas": (0.8, 0.9)}, "AdamW"),
        (lowmem_optim.AdaLomo, {}, "AdaLomo"),
        (lowmem_optim.SinkGD, {"iterations": 1, "momentum": 0.9, "nesterov": True}, "SinkGD = MNGD"),
        (lowmem_optim.MNGD, {"norms": ("col", "row", "frobenius")}, "MNGD"),
        (lowmem_optim.APOLLO, {"scale_type": "tensor"}, "APOLLO"),
        (torch.optim.SGD, {}, "Lomo"),
        (torch.optim.Adafactor, {}, "TorchAdafactor"),
        (torch.optim.Adafactor, {"d": 2.0, "beta2_decay": -0.5, "foreach": True}, "TorchAdafactor"),
        (transformers.Adafactor, {}, "Adafactor = AdaLomo"),
        (transformers.Adafactor, {"scale_parameter": False, "beta1": 0.9}, "Adafactor"),
        (CAME, {}, "CAME"),
        (AdaLomo, {}, "AdaLomo"),
        (Lomo, {}, "Lomo"),
        (broken.TinyAdam, {}, "AdamW"),
        (broken.HiddenBetas, {}, "AdamW"),
        (broken.HiddenBetas, {"betas": (0.7, 0.8)}, "AdamW"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_dialects_of_others_are_recognized(cls, options, rule):
    subject = Subject(cls.__name__, cls, options)
    assert PROBES["rule"](subject, recognize(subject)).finding == rule


def test_a_rule_that_nobody_knows():
    found = verdict(torch.optim.RMSprop, "rule")
    assert found.finding == "none known"
    assert not found.wrong
    assert verdict(torch.optim.RMSprop, "place of eps").finding == "unknown"
    assert verdict(torch.optim.RMSprop, "shapes").finding == "all"


@pytest.mark.parametrize(
    ("cls", "against", "finding", "is_wrong"),
    [
        (torch.optim.AdamW, "adamw", "AdamW", False),
        (transformers.Adafactor, "adalomo", "AdaLomo = Adafactor", False),
        (transformers.Adafactor, "TorchAdafactor", "TorchAdafactor, not with large lr, large eps, weight decay", True),
        (torch.optim.Adam, "AdamW", "AdamW, not with weight decay", True),
        (torch.optim.SGD, "CAME", "not CAME", True),
    ],
)
def test_against_a_rule(cls, against, finding, is_wrong):
    found = verdicts(cls, find_rule(against))["rule"]
    assert (found.finding, found.wrong) == (finding, is_wrong)


@pytest.mark.parametrize(
    ("cls", "probe", "finding", "is_wrong"),
    [
        (broken.CoupledDecay, "weight decay", "coupled", False),
        (torch.optim.Adam, "weight decay", "coupled", False),
        (broken.TinyAdam, "weight decay", "decoupled, times lr, of the old value", False),
        (broken.DecayAfter, "weight decay", "decoupled, times lr, of the new value", False),
        (broken.DecayWithoutLr, "weight decay", "decoupled, times nothing, of the old value", False),
        (broken.MaskedDecay, "weight decay", "not proportional", False),
        (broken.RateOfStep, "weight decay", r"decoupled, times \S+ and \S+ in two steps, of the old value", False),
        (broken.CoupledMomentum, "weight decay", "coupled", False),
        (broken.DecayForgotten, "weight decay", "without effect", True),
        (transformers.Adafactor, "weight decay", "decoupled, times lr RMS(p), of the old value", False),
        (AdaLomo, "weight decay", "decoupled, times lr RMS(p), of the old value", False),
        (torch.optim.Adafactor, "weight decay", "decoupled, times lr, of the old value", False),
        (broken.DecayAfter, "rule", "AdamW, not with weight decay", False),
        (broken.TinyAdam, "place of eps", "outside", False),
        (broken.EpsInside, "place of eps", "inside", False),
        (broken.EpsInside, "rule", "AdamW, not with large eps", False),
        (broken.EpsTwice, "place of eps", "none known", False),
        (torch.optim.Adafactor, "place of eps", "floor", False),
        (transformers.Adafactor, "place of eps", "square", False),
        (torch.optim.SGD, "place of eps", "none", False),
        (broken.LowRank, "rank of update", "2", False),
        (broken.FirstStepLooks, "rank of update", "full", False),
        (broken.FirstStepLooks, "weight decay", "decoupled, times lr, of the old value", False),
        (broken.Nondeterministic, "two runs", "differ", True),
        (broken.GlobalNoise, "two runs", "same bits if seeded", False),
        (broken.StateLost, "resuming", "differs in float32 and bfloat16", True),
        (broken.NotWeightsOnly, "resuming", "checkpoint refused", True),
        (CAME, "resuming", "differs in bfloat16", True),
        (CAME, "load_state_dict", "cast", True),
        (torch.optim.AdamW, "load_state_dict", "keeps dtypes", False),
        (torch.optim.NAdam, "load_state_dict", "cast", True),
        (broken.ChangesGradients, "gradients after step", "changed", True),
        (broken.FreesGradients, "gradients after step", "freed", False),
        (broken.MovesWithoutGradient, "grad is None", "moves", True),
        (broken.DecayWithoutLr, "lr=0, zero gradients", "changes parameters", True),
        (broken.TinyAdam, "lr=0, zero gradients", "nothing changes", False),
        (broken.TinyAdam, "shapes", "all", False),
        (broken.ContiguousOnly, "shapes", r"transposed is \S+ tolerances off; strided is \S+ tolerances off", True),
        (broken.MatricesOnly, "shapes", "4-D convolution raises NotImplementedError", True),
        (torch.optim.Adafactor, "shapes", "empty raises ZeroDivisionError", True),
        (torch.optim.Muon, "shapes", "1-D raises ValueError; scalar .*; 4-D .*", True),
        (broken.TinyAdam, "NaN gradient", "element lost for good", False),
        (transformers.Adafactor, "Inf gradient", "tensor lost for good", False),
        (broken.SkipsNan, "NaN gradient", "step skipped", False),
        (broken.HidesNan, "NaN gradient", "element stuck", False),
        (broken.TinyAdam, "bfloat16 updates", "lost", False),
        (lowmem_optim.AdamW, "bfloat16 updates", "kept on average", False),
        (torch.optim.AdamW, "state of bfloat16", "bfloat16, 4 and 4 bytes", False),
        (torch.optim.Adafactor, "state of bfloat16", "bfloat16, 0.0156 and 2 bytes", False),
        (lowmem_optim.AdaLomo, "state of bfloat16", "float32, 0.0312 and 4 bytes", False),
        (lowmem_optim.Lomo, "state of bfloat16", "none", False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_probe(cls, probe, finding, is_wrong):
    found = verdict(cls, probe)
    assert re.fullmatch(finding.replace("(p)", r"\(p\)"), found.finding)
    assert found.wrong is is_wrong


def test_options_of_a_group():
    """As galore_torch has them: a rank that only the group tells."""
    ranks = [{}, {"rank": 3}]
    subjects = [Subject("RankOfGroup", broken.RankOfGroup, group=group) for group in ranks]
    assert [PROBES["rank of update"](each, recognize(each)).finding for each in subjects] == ["full", "3"]


def test_what_cannot_take_a_step_is_refused():
    with pytest.raises(ValueError, match="Raises cannot take a step here: RuntimeError: no"):
        verdicts(broken.Raises)


def test_random_numbers_are_left_as_they_were():
    before = torch.get_rng_state()
    verdicts(broken.GlobalNoise)
    assert torch.equal(torch.get_rng_state(), before)
