"""Losses and settings from plain dicts, as YAML and hydra give them."""

import importlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("yaml", reason="pyyaml is not installed")

import yaml

from var_kernels import VARLoss
from var_kernels.integrations.trainer import VARConfig, method_config


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
        ("var", {"lam": "much"}, "lam: expected float, got 'much'"),
        ("dpo", {"beta": "a lot"}, "beta: expected float, got 'a lot'"),
        ("var", {"max_length": "8.5"}, "max_length: expected int, got '8.5'"),
        ("var", {"normalizer": "rows"}, "normalizer"),
    ],
)
def test_what_is_no_number_is_named(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        method_config(method)(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(TypeError, match="lamda"):
        VARConfig(output_dir=str(tmp_path), lamda=1.0)
