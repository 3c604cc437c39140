"""A loss of your own by the recipe of docs/extending.md; TRL's formulas by our names."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

pytest.importorskip("transformers")

from var_kernels import linear_logprob, linear_loss
from var_kernels.integrations.trainer import config, method_config, methods
from var_kernels.losses import (
    LOSSES,
    dpo_loss,
    exo_loss,
    group_advantage,
    hinge_loss,
    ipo_loss,
    register,
    robust_dpo_loss,
    simpo_loss,
)

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = {
    page: re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    for page in ("extending.md", "migration.md")
}


@pytest.fixture
def registries():
    tables = (LOSSES, methods.METHODS, config.METHOD_CONFIGS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def names():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 8, generator=generator, requires_grad=True)
    return {
        "hidden": hidden,
        "lm_head_weight": torch.randn(50, 8, generator=generator),
        "labels": torch.randint(50, (4, 5), generator=generator),
        "ref_logp": -20 + torch.randn(4, generator=generator),
    }


def test_the_recipe(registries, tmp_path, monkeypatch):
    """The block registers a loss, takes it from hidden states and trains a model by it, with the trainer's metrics."""
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given = names()
    for block in BLOCKS["extending.md"][1:3]:
        exec(compile(block, "docs/extending.md", "exec"), given)
    s = linear_logprob(given["hidden"].detach(), given["lm_head_weight"], given["labels"]).sum(1)
    margin = 0.1 * (s - given["ref_logp"]).unflatten(0, (2, 2)).diff(dim=1).squeeze(1).neg()
    slope = 0.1 * (-margin).sigmoid()  # of -log sigmoid(margin), in the rejected half
    leaf = given["hidden"].detach().requires_grad_()
    logp = linear_logprob(leaf, given["lm_head_weight"], given["labels"]).sum(1)
    (slope * (logp[1::2] - logp[0::2]) - 0.5 * logp[0::2] / 5).sum().backward()
    torch.testing.assert_close(given["hidden"].grad, leaf.grad)
    assert method_config("rpo")("unused", use_cpu=True).alpha == 1.0
    assert {"pair_margin", "logp_chosen"} <= set(given["trainer"].state.log_history[0])


def test_what_a_registration_refuses(registries, tmp_path):
    with pytest.raises(ValueError, match=r"loss 'dpo' must have a new name.*'dpo' is dpo_loss already"):
        register("dpo", pass_class="C", item="pair", formula="")
    with pytest.raises(ValueError, match="got pass_class='E', item='pair'"):
        register("mine", pass_class="E", item="pair", formula="")
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'mine'"):
        method_config("mine")

    @register("mine", pass_class="B", item="token", formula="-A lp")
    def mine_loss(token_logp, wage):
        return -wage * token_logp

    with pytest.raises(ValueError, match=r"inputs of 'mine' must be among .*group_ids, .* got wage; .*loop of your"):
        method_config("mine")

    @register("mine too", pass_class="C", item="pair", formula="-tilt s_w + drop s_l")
    def tilted_loss(policy_chosen_logp, policy_rejected_logp, *, tilt, drop=0.5):
        return drop * policy_rejected_logp - tilt * policy_chosen_logp

    facts = {"pass_class": "C", "item": "pair", "formula": ""}
    with pytest.raises(ValueError, match="defaults must name options of the loss 'mine as well', got tilted"):
        register("mine as well", defaults={"tilted": 2.0}, **facts)(LOSSES["mine too"].function)
    register("mine as well", defaults={"tilt": 2.0}, **facts)(LOSSES["mine too"].function)
    assert method_config("mine as well")(tmp_path, use_cpu=True, report_to="none").tilt == 2.0
    assert methods.METHODS["mine as well"].loss.compares == ""
    register("of prompts", **{**facts, "item": "group"})(lambda policy_logp, reward, group_ids: None)
    assert LOSSES["of prompts"].compares == "prompt"
    with pytest.raises(ValueError, match="'mine too' needs a default for tilt"):
        method_config("mine too")
    assert LOSSES["mine too"].option_types == {"tilt": float, "drop": float}


@pytest.mark.parametrize("pass_class", "AC")
def test_a_mean_in_place_of_items_is_refused(registries, pass_class):
    register("mine", pass_class=pass_class, formula="-mean s")(lambda policy_logp: -policy_logp.mean())
    given = names()
    with pytest.raises(ValueError, match=r"'mine' must return one loss an item, shape \(4,\), got \(\); leave the sum"):
        linear_loss("mine", given["hidden"], given["lm_head_weight"], given["labels"])


def test_advantages_made_inside_of_a_loss(registries):
    """Sums over prompts, too, where class A's slopes are taken."""

    @register("mine", pass_class="A", formula="-A s")
    def mine(policy_logp, reward, group_ids):
        return -group_advantage(reward, group_ids) * policy_logp

    given, reward, group_ids = names(), torch.tensor([1.0, 2.0, 5.0, 4.0]), torch.tensor([0, 0, 1, 1])
    rows = (given["hidden"], given["lm_head_weight"], given["labels"])
    got = linear_loss("mine", *rows, {"reward": reward, "group_ids": group_ids})
    torch.testing.assert_close(got, linear_loss("reinforce", *rows, {"advantage": group_advantage(reward, group_ids)}))


def test_several_losses_of_one_pass_over_the_head():
    given = names()
    given |= {
        "states": given["hidden"],
        "ids": given["labels"],
        "lm_head": SimpleNamespace(weight=given["lm_head_weight"]),
    }
    (block,) = [block for block in BLOCKS["migration.md"] if "sequence_sum" in block]
    exec(compile(block, "docs/migration.md", "exec"), given)
    s = linear_logprob(given["hidden"].detach(), given["lm_head_weight"], given["labels"]).sum(1)
    margin = 0.1 * ((s - given["ref_logp"])[0::2] - (s - given["ref_logp"])[1::2])
    torch.testing.assert_close(given["loss"].detach(), (-logsigmoid(margin) - 0.2 * s[0::2]).mean())
    assert given["hidden"].grad.any()


def test_trls_formulas_under_our_names():
    """Written out as TRL 1.16 has them."""
    generator = torch.Generator().manual_seed(1)
    policy_w, policy_l, ref_w, ref_l = (-20 + 3 * torch.randn(4, 6, dtype=torch.float64, generator=generator)).unbind(0)
    logps, lengths = (policy_w, policy_l, ref_w, ref_l), (torch.arange(1, 7), torch.arange(7, 1, -1))
    beta, e = 0.3, 0.1
    ratio_w, ratio_l = policy_w - ref_w, policy_l - ref_l
    delta = ratio_w - ratio_l
    clean, flipped = logsigmoid(beta * delta), logsigmoid(-beta * delta)
    per_token = ratio_w / lengths[0] - ratio_l / lengths[1]
    qw, ql = (beta * delta).sigmoid(), (-beta * delta).sigmoid()
    interleaved = [torch.stack(pair, 1).flatten() for pair in ((policy_w, policy_l), (ref_w, ref_l))]
    rewards = torch.tensor([math.log(1 - e), math.log(e)], dtype=torch.float64).repeat(6)
    exo = exo_loss(*interleaved, rewards, torch.arange(12) // 2, beta=beta, reward_temperature=1.0)
    cases = {
        "sigmoid": (dpo_loss(*logps, beta=beta), -clean),
        "hinge": (hinge_loss(*logps, beta=beta), relu(1 - beta * delta)),
        "robust": (
            robust_dpo_loss(*logps, beta=beta, label_smoothing=e),
            (-(1 - e) * clean + e * flipped) / (1 - 2 * e),
        ),
        "ipo": (ipo_loss(*logps, *lengths, tau=beta), (per_token - 1 / (2 * beta)) ** 2),
        "exo_pair": (exo.view(6, 2).sum(1), qw * (clean - math.log(1 - e)) + ql * (flipped - math.log(e))),
        "sigmoid_norm": (simpo_loss(ratio_w, ratio_l, *lengths, beta=beta, gamma=0.0), -logsigmoid(beta * per_token)),
    }
    for name, (ours, theirs) in cases.items():
        torch.testing.assert_close(ours, theirs, msg=name)
