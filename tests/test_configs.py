"""Losses and settings from plain dicts, as YAML and hydra give them."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("yaml", reason="pyyaml is not installed")

import yaml

from benchmarks.demo import experiment
from var_kernels import VARLoss, var_weights
from var_kernels.integrations.trainer import VARConfig, method_config
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.losses import var_loss
from var_kernels.losses.weights import DEFAULT_NORMALIZER, DEFAULT_REFERENCE
from var_kernels.reference import var_weights_ref


def by_import(settings):
    """What hydra.utils.instantiate does with one level of settings."""
    settings = dict(settings)
    module, name = settings.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**settings)


def by_hydra(settings):
    utils = pytest.importorskip("hydra.utils", reason="hydra-core is not installed")
    return utils.instantiate(settings)


@pytest.fixture(params=[by_import, by_hydra])
def instantiate(request):
    return request.param


def test_a_loss(instantiate):
    text = "{_target_: var_kernels.VARLoss, lam: 0.5, normalizer: group, reference: none}"
    loss_fn = instantiate(yaml.safe_load(text))
    assert isinstance(loss_fn, VARLoss)
    head = (torch.randn(2, 3, 4), torch.randn(9, 4), torch.randint(9, (2, 3)))
    assert torch.isfinite(loss_fn(*head, torch.tensor([1.0, 0.0]), group_ids=torch.tensor([0, 0])))


def test_settings_with_numbers_that_yaml_reads_as_text(instantiate, tmp_path):
    text = f"{{_target_: var_kernels.integrations.trainer.VARConfig, output_dir: {tmp_path}, lam: 5e-1, "
    settings = yaml.safe_load(
        text + "learning_rate: 1e-4, max_steps: 3, workspace_mb: 8e0, use_cpu: true, report_to: []}"
    )
    assert settings["learning_rate"] == "1e-4"
    config = instantiate(settings)
    assert isinstance(config, VARConfig)
    assert (config.lam, config.learning_rate, config.workspace_mb, config.max_steps) == (0.5, 1e-4, 8.0, 3)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("var", {"lam": "much"}, "lam must be of type float, got 'much'"),
        ("dpo", {"beta": "a lot"}, "beta must be of type float, got 'a lot'"),
        ("var", {"max_length": "8.5"}, "max_length must be of type int, got '8.5'"),
        ("var", {"normalizer": "rows"}, "normalizer"),
        ("var", {"lam": True}, "lam must be of type float, got True"),
        ("var", {"max_length": 8.5}, "max_length must be of type int, got 8.5"),
        ("var", {"workspace_mb": float("inf")}, "workspace_mb must be finite and > 0, or None, got inf"),
        ("var", {"disable_dropout": "no"}, "disable_dropout must be of type bool, got 'no'"),
        ("alol", {"squash": "no"}, "squash must be of type bool, got 'no'"),
        ("kto", {"desirable_above": None}, "desirable_above must be of type float, got None"),
        ("sail_pp", {"online": True, "iterations": None}, "iterations must be of type int, got None"),
        ("ava_p", {"head_learning_rate": -1.0}, "head_learning_rate must be finite and >= 0, got -1.0"),
        ("dro", {"head_learning_rate": float("inf")}, "head_learning_rate must be finite and >= 0, got inf"),
        ("astar_po", {"value_temperature": 0.0}, "value_temperature must be finite and > 0, got 0.0"),
        ("distill", {"beta": 1.0}, r"beta must be in \(0, 1\), got 1.0; its limits are direction"),
        ("distill", {"teacher_temperature": float("inf")}, "teacher_temperature must be finite and > 0, got inf"),
    ],
)
def test_what_is_no_number_is_named(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        method_config(method)(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(TypeError, match="lamda"):
        VARConfig(output_dir=str(tmp_path), lamda=1.0)


# ---- one default pair of normalizer and reference --------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
PAIR = {"normalizer": DEFAULT_NORMALIZER, "reference": DEFAULT_REFERENCE}


def declared_defaults():
    """(place, normalizer, reference), None where the place says nothing of its own."""
    for function in (var_weights, var_loss, var_weights_ref, VARLoss.__init__):
        parameters = inspect.signature(function).parameters
        yield function.__qualname__, parameters["normalizer"].default, parameters["reference"].default
    fields = {field.name: field.default for field in dataclasses.fields(VARConfig)}
    yield "VARConfig", fields["normalizer"], fields["reference"]
    options = METHODS["var"].own_settings
    yield "var-kernels methods var", options["normalizer"][1], options["reference"][1]
    method, settings = experiment.METHODS["VAR"]
    yield "the demo", settings.get("normalizer"), settings.get("reference")
    assert method == "var"
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        yield path.name, settings.get("normalizer"), settings.get("reference")
    text = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "losses", "var")}
    rows = dict(re.findall(r"^\| `(normalizer|reference)` \| `(\w+)` \|", text["training"], re.M))
    yield "docs/training.md", rows["normalizer"], rows["reference"]
    found = re.search(r"`normalizer` (\w+), `reference` (\w+)", text["losses"])
    yield "docs/losses.md", *found.groups()
    found = re.search(r'## The default\n\n`normalizer="(\w+)"`, `reference="(\w+)"`', text["var"])
    yield "docs/var.md", *found.groups()


def test_every_place_has_the_same_default_pair():
    places = list(declared_defaults())
    assert len(places) >= 12
    for place, normalizer, reference in places:
        assert normalizer in (None, PAIR["normalizer"]), place
        assert reference in (None, PAIR["reference"]), place
    assert VARConfig("unused", use_cpu=True, report_to=[]).normalizer == PAIR["normalizer"]
    assert f"normalizer={PAIR['normalizer']!r}, reference={PAIR['reference']!r}" in repr(VARLoss(lam=1.0))


@pytest.mark.parametrize("name", ["README.md", "examples/loss_module.py", "docs/embedding.md"])
def test_examples_call_the_default_pair(name):
    calls = re.findall(r"VARLoss\(([^)]*)\)", (ROOT / name).read_text())
    assert calls
    assert all("normalizer" not in call and "reference" not in call for call in calls)
    commands = [line for line in (ROOT / name).read_text().splitlines() if "var-kernels train" in line]
    assert all("--normalizer" not in line and "--reference" not in line for line in commands)
