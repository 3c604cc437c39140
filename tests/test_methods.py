"""Every method trains: each on its data, its step equal to the naive one, micro-batches adding up, heads saved."""

import pytest
import torch

from tests.tiny_training import ROWS, losses, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.data import DataError, encode_examples, parse_row
from var_kernels.integrations.hf.heads import load_head
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.losses import LOSSES, MODEL_LOSSES, advantages_by_name, single_name, soft_value

PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][2],
     "chosen_reward": row["rewards"][0], "rejected_reward": row["rewards"][2]} for row in ROWS
]  # fmt: skip
ALL = sorted(METHODS)
# Items of a batch that hold the whole data set, so that one step sees all of it.
EVERYTHING = 24


def run(folder, method, rows=ROWS, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": EVERYTHING, "learning_rate": 0.01} | options
    trainer = tiny_trainer(folder, rows, method=method, **settings)
    trainer.train()
    return trainer


def test_every_loss_of_the_registry_can_be_trained():
    assert set(METHODS) == {*LOSSES, *MODEL_LOSSES}


@pytest.mark.parametrize("method", ALL)
def test_trains(method, tmp_path):
    trainer = run(tmp_path, method, max_steps=3)
    before, after = tiny_model().state_dict(), trainer.model.state_dict()
    assert all(value == value and abs(value) < 1e6 for value in losses(trainer))
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert ("lm_head.weight" in moved) == METHODS[method].loss.reads_policy
    assert "model.layers.0.self_attn.q_proj.weight" in moved


@pytest.mark.parametrize("method", [name for name in ALL if METHODS[name].need_rewards != "required"])
def test_trains_on_pairs_without_rewards(method, tmp_path):
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]
    assert len(losses(run(tmp_path, method, rows))) == 2


@pytest.mark.parametrize("method", [name for name in ALL if METHODS[name].need_rewards != "optional"])
def test_missing_rewards_are_named(method, tmp_path):
    rows = [{key: row[key] for key in ("prompt", "completions")} for row in ROWS]
    with pytest.raises(DataError, match="train_dataset row 1: rewards must be in the data, since this method"):
        tiny_trainer(tmp_path, rows, method=method)


@pytest.mark.parametrize("method", [name for name in ALL if METHODS[name].loss.item in ("pair", "group")])
def test_one_completion_a_prompt_is_not_enough(method, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completions"][0], "reward": 1.0} for row in ROWS]
    wrong = f"method '{method}' (needs pairs|compares the completions).*\\(train_dataset row 1, train_dataset row 2, "
    with pytest.raises(ValueError, match=wrong):
        tiny_trainer(tmp_path, rows, method=method)
    assert not (tmp_path / "run").exists()


def test_single_completions_have_advantages_of_their_own(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completions"][0], "reward": 0.1 * i - 0.3}
            for i, row in enumerate(ROWS)]  # fmt: skip
    with pytest.raises(ValueError, match=r"no prompt has two .*, or take advantages='batch' or 'given'"):
        tiny_trainer(tmp_path, rows, method="reinforce")
    trainer = run(tmp_path, "reinforce", rows, advantages="given", length_normalization="token", max_steps=1)
    table = naive_rows(tiny_model(), rows)  # weighted SFT: sum of w nll over the tokens of the batch
    total = sum(-entry["reward"] * entry["logp"].sum() for entry in table) / sum(len(entry["logp"]) for entry in table)
    assert losses(trainer)[0] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_prompts_of_one_completion_among_others_are_named(method, tmp_path, caplog):
    rows = [*ROWS[:6], *({"prompt": r["prompt"], "completion": r["completions"][0], "reward": 1.0} for r in ROWS[6:])]
    trainer = tiny_trainer(tmp_path, rows, method=method)
    assert len(trainer.train_dataset) == 6
    assert "2 of 8 prompts have" in caplog.text
    assert "are left out: train_dataset row 7, train_dataset row 8" in caplog.text


@pytest.mark.parametrize("method", ALL)
def test_bad_rows_are_named_and_nothing_is_left_behind(method, tmp_path):
    """A reward that is no number, and a prompt alone: whatever the method does with rewards."""
    broken = {**ROWS[3], "rewards": [1.0, float("nan"), 0.5]}
    for row, reason in ((broken, r"rewards\[1\] must be finite, got nan"), ({"prompt": "p"}, "a row must have")):
        with pytest.raises(DataError, match=f"^train_dataset row 4: {reason}"):
            tiny_trainer(tmp_path, [*ROWS[:3], row, *ROWS[4:]], method=method)
    assert not list(tmp_path.iterdir())


# KTO's baseline is that of a micro-batch, and a policy's labels are drawn for each: those two are other objectives.
ADDITIVE = [name for name in ALL if name not in ("kto", "sail_dp", "sail_pp")]


@pytest.mark.parametrize("method", ADDITIVE)
def test_micro_batches_add_up(method, tmp_path):
    """The same parameters after two steps, whether a step is one micro-batch or several."""
    one = run(tmp_path / "one", method, data_seed=1)
    items = len(one.train_dataset)
    size = {24: 6, 8: 2}[items]
    parts = run(tmp_path / "parts", method, data_seed=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=items // size)  # fmt: skip
    torch.testing.assert_close(losses(parts), losses(one), rtol=1e-6, atol=1e-9)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


# ---- the naive step --------------------------------------------------------------------------------------------------


def naive_rows(model, rows=ROWS):
    """What is known of every row: log-probs of its completion's tokens by full logits, and so on."""
    encoded = encode_examples([parse_row(row, "") for row in rows], tokenizer(), 32)
    table = []
    for number, members in enumerate(encoded.groups):
        for index in members:
            row = encoded.row(index)
            output = model(row["input_ids"][None], output_hidden_states=True)
            kept = (row["labels"] != -100).nonzero().flatten()
            token_logp = output.logits[0].log_softmax(-1)[kept - 1, row["labels"][kept]]
            state = output.hidden_states[-1][0, kept[0] - 1]
            policy = output.logits[0].log_softmax(-1)[kept - 1]
            entropy = -(policy.exp() * policy).sum(-1)
            table.append(
                {
                    "logp": token_logp,
                    "entropy": entropy,
                    "reward": row["reward"].double(),
                    "group": number,
                    "state": state,
                }
            )
    return table


def naive_loss(method, config):
    """The first step's loss and the gradient of the lm_head by autograd over full logits, one sequence at a time."""
    model = tiny_model()
    table = naive_rows(model)
    ref = [entry["logp"].detach() for entry in table]
    reward = torch.stack([entry["reward"] for entry in table])
    group = torch.tensor([entry["group"] for entry in table])
    s = torch.stack([entry["logp"].sum() for entry in table])
    sr = s.detach()
    length = torch.tensor([len(entry["logp"]) for entry in table])
    loss = LOSSES[method]
    options = METHODS[method].loss.options_of(config)
    columns = {"policy_logp": s, "ref_logp": sr, "reward": reward, "lengths": length, "group_ids": group}
    columns["old_logp"] = sr  # the reference stands for what drew the data
    if hasattr(config, "advantages"):
        columns["advantage"] = advantages_by_name(config.advantages, reward, group)
    shared = "token" if hasattr(config, "sft_on") else getattr(config, "length_normalization", "")
    count = {"sequence": length, "token": length.sum() / len(table)}.get(shared, 1)
    if loss.item == "pair":
        best = [int((reward + (group != g) * -1e9).argmax()) for g in group.unique()]
        worst = [int((reward + (group != g) * 1e9).argmin()) for g in group.unique()]
        chosen = {0: best, 1: worst}
        arguments = {}
        for name in loss.tensors:
            single, which = single_name(name)
            if single in columns:
                arguments[name] = columns[single][chosen[which]]
        return model, loss.function(**arguments, **options).mean()
    if loss.item == "group":
        arguments = {name: columns[name] for name in loss.tensors}
        return model, loss.function(**arguments, **options).sum() / 8
    if method == "awr":
        columns["advantage"] = (reward - reward.mean()) / (reward.std(correction=0) + 1e-5)
    if method == "astar_po":
        columns["value"] = soft_value(reward, group, temperature=config.beta)
    if method == "qrpo":
        columns["reward"] = torch.stack(
            [(reward[group == g] <= r).double().mean() for r, g in zip(reward, group, strict=True)]
        )
    if method == "kto":
        columns["desirable"] = reward > config.desirable_above
    if method == "dro":
        columns["reward"] = (reward - reward.mean()) / reward.std(correction=0)
        columns["value"] = torch.zeros_like(s)  # the head's outputs are 0 at the start
        value_part = 0.5 * (columns["reward"] ** 2).mean()
        arguments = {name: columns[name] for name in loss.tensors}
        return model, loss.function(**arguments, **options).mean() + value_part
    if loss.item == "token":
        total = 0.0
        for index, entry in enumerate(table):
            advantage = columns["advantage"][index] if "advantage" in columns else reward[index].sigmoid()
            values = {"token_logp": entry["logp"], "old_token_logp": ref[index], "ref_token_logp": ref[index]}
            values["advantage"], values["entropy"] = advantage.expand_as(entry["logp"]), entry["entropy"]
            terms = loss.function(**{name: values[name] for name in loss.tensors}, **options)
            share = count[index] if isinstance(count, torch.Tensor) and count.dim() else count
            total = total + terms.sum() / share / len(table)
        return model, total
    arguments = {name: columns[name] for name in loss.tensors if name in columns}
    return model, (loss.function(**arguments, **options) / count).mean()


NAIVE = ["dpo", "robust_dpo", "ipo", "hinge", "slic", "simpo", "orpo", "rebel", "sail_pr", "exo", "lire", "raft", "awr",
         "weighted_bc", "qrpo", "kto", "dro", "rlol", "rgold", "ppo", "grpo", "cispo", "sapo", "gspo", "reinforce",
         "vespo", "topr", "info_nca", "nca", "gvpo", "target_po", "astar_po", "iw_sft_token", "psft",
         "eaft", "chord_phi", "iw_sft"]  # fmt: skip


@pytest.mark.parametrize("method", NAIVE)
def test_first_step_is_the_naive_one(method, tmp_path):
    all_rows = {"sft_on": "all"} if "sft_on" in METHODS[method].settings else {}
    trainer = run(tmp_path, method, max_steps=1, learning_rate=0.1, logging_steps=1, **all_rows)
    model, loss = naive_loss(method, trainer.args)
    loss.backward()
    # logged in fp32, and made of fp32 sums of reference log-probs
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=2e-5, abs=2e-5)
    step = (tiny_model().lm_head.weight - trainer.model.lm_head.weight) / 0.1
    torch.testing.assert_close(step.detach(), model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["sail_pp", "sail_pr"])
def test_baseline_trains_and_needs_another_pair(method, tmp_path):
    losses_of = [
        losses(run(tmp_path / baseline, method, max_steps=3, baseline=baseline))
        for baseline in ("none", "leave_one_out")
    ]
    assert abs(losses_of[1][0]) < 0.1 * abs(losses_of[0][0])  # F is log 1/2 for every pair at the start
    with pytest.raises(ValueError, match="at least 2 for baseline='leave_one_out', the mean over the other pairs"):
        tiny_trainer(tmp_path, method=method, baseline="leave_one_out", per_device_train_batch_size=1)


def test_policy_labels_are_drawn_anew_and_reproducibly(tmp_path):
    first, again = run(tmp_path / "1", "sail_dp", max_steps=4), run(tmp_path / "2", "sail_dp", max_steps=4)
    other = run(tmp_path / "3", "sail_dp", max_steps=4, seed=8)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


# ---- heads beside the lm_head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dro", "ava_d", "ava_p"])
def test_heads_learn_are_saved_and_resumed(method, tmp_path):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = run(tmp_path / "whole", method, max_steps=4, **options)
    assert any(parameter.abs().max() > 0 for parameter in whole.extra_head.parameters())
    saved = load_head(tmp_path / "whole" / "run" / "checkpoint-4")
    for ours, theirs in zip(saved.parameters(), whole.extra_head.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.float())

    settings = {"max_steps": 4, "per_device_train_batch_size": EVERYTHING, **options}
    resumed = tiny_trainer(tmp_path / "whole", method=method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6)

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "run" / "checkpoint-4")


def test_ava_ranks_pairs_by_its_reward_head(tmp_path):
    trainer = run(tmp_path, "ava_p", max_steps=60, optim="adamw_torch", learning_rate=3e-3, head_learning_rate=0.02,
                  contrast=20.0)  # fmt: skip
    assert trainer.state.log_history[-2]["pair_accuracy"] == 1.0


def test_fitted_values_follow_the_rewards(tmp_path):
    """Prompts whose rewards differ by what the prompt says: the value head finds it, and says so of unseen prompts."""
    rows = [
        {"prompt": f"{a} {word} ", "completions": ["1", "2"], "rewards": [base + 0.1, base - 0.1]}
        for a in range(12)
        for word, base in (("good", 2.0), ("bad", -2.0))
    ]
    trainer = tiny_trainer(tmp_path, rows, method="alol", trainer_options={"eval_dataset": rows[:4]})
    values = trainer.train_dataset.rows.columns["value"].view(-1, 2)[:, 0]
    good, bad = values[0::2], values[1::2]
    assert (good - torch.tensor(2.0).sigmoid()).abs().max() < 0.1
    assert (bad - torch.tensor(-2.0).sigmoid()).abs().max() < 0.1
    assert torch.equal(trainer.eval_dataset.rows.columns["value"], trainer.train_dataset.rows.columns["value"][:8])


@pytest.mark.parametrize("method", ["alol", "alol_ref_free"])
def test_values_are_those_of_a_reference_that_is_given(method, tmp_path):
    rows = [{**row, "rewards": [x - 2 * ("+ 1" in row["prompt"]) for x in row["rewards"]]} for row in ROWS]
    given, own, policy = (
        tiny_trainer(tmp_path / name, rows, model=tiny_model(seed), method=method, trainer_options=options)
        for name, seed, options in (
            ("given", 0, {"ref_model": tiny_model(1)}), ("own", 1, {}), ("policy", 0, {}),
        )
    )  # fmt: skip
    values = [trainer.train_dataset.rows.columns["value"] for trainer in (given, own, policy)]
    torch.testing.assert_close(values[0], values[1])
    assert (values[0] - values[2]).abs().max() > 1e-4


def test_prompts_are_run_once_for_their_values(tmp_path, monkeypatch):
    """Each prompt without its completions, and not once for each of them; states as the whole rows have them."""
    from var_kernels.integrations.trainer import value_head

    seen = []

    def counted(model, fn, inputs, **options):
        seen.append(inputs["input_ids"])
        return values_capture(model, fn, inputs, **options)

    values_capture = value_head.capture
    monkeypatch.setattr(value_head, "capture", counted)
    trainer = tiny_trainer(tmp_path, ROWS, method="alol")
    assert sum(map(len, seen)) == len(ROWS)
    states = value_head.prompt_states(trainer, trainer.model, trainer.train_dataset.rows)
    expected = torch.stack([entry["state"] for entry in naive_rows(tiny_model())])
    torch.testing.assert_close(states, expected.detach().float(), rtol=1e-5, atol=1e-6)


def test_values_that_nothing_explains_are_the_mean(tmp_path):
    """Rewards that do not depend on the prompt."""
    rows = [{"prompt": f"{a} ", "completions": ["1", "2"], "rewards": [1.0, 0.0]} for a in range(10)]
    value = tiny_trainer(tmp_path, rows, method="alol").train_dataset.rows.columns["value"]
    torch.testing.assert_close(value, torch.full((20,), (torch.tensor([1.0, 0.0]).sigmoid().mean().item())))


# ---- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["raft", "alol_ref_free", "sft", "dpo", "dft", "asft"])
def test_logged_log_probs_are_those_of_what_was_computed(method, tmp_path):
    """One pass leaves out rows that the loss gives no weight: they are no part of the means."""
    trainer = run(tmp_path, method, max_steps=1, logging_steps=1)
    table = naive_rows(tiny_model())
    group = torch.tensor([entry["group"] for entry in table])
    reward = torch.stack([entry["reward"] for entry in table])
    if method == "alol_ref_free":
        value = trainer.train_dataset.rows.columns["value"]
        counted = {index for index in range(len(table)) if reward[index].sigmoid() > value[index]}
        assert 0 < len(counted) < len(table)
    else:
        counted = {int((reward + (group != g) * -1e9).argmax()) for g in group.unique()}
        if method == "dpo":
            counted |= {int((reward + (group != g) * 1e9).argmin()) for g in group.unique()}
    logp = torch.cat([table[index]["logp"] for index in sorted(counted)])
    assert trainer.state.log_history[0]["nll_per_token"] == pytest.approx(-logp.mean().item(), rel=1e-5)
