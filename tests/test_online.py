"""Online training: what is drawn, how it is scored, what is trained on, and how the rounds follow one another."""

import copy
import math
import random

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_online import PROMPTS, Recording, buffered, online_trainer, reward, trained
from tests.tiny_training import ROWS, losses, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.data import load_examples
from var_kernels.integrations.trainer.config import _why_not
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.integrations.trainer.online import GenerateSampler
from var_kernels.integrations.trainer.online.buffer import Drawn
from var_kernels.integrations.trainer.online.draws import FixedLengthItems, encode_drawn, label_pairs, measures
from var_kernels.integrations.trainer.online.sampler import without_padding

SAMPLER = GenerateSampler(pad_token_id=2, end_token_ids=(1,))
FITTING = sorted(name for name, method in METHODS.items() if not _why_not(name, method))


def prompt_ids(count=3):
    return [tokenizer()(row["prompt"] + "?" * number)["input_ids"] for number, row in enumerate(ROWS[:count])]


def naive_logp(model, row, number):
    """(tokens,) of a buffered completion, by full logits."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][number]])
    logp = model(ids).logits[0].log_softmax(-1)
    start = len(row["prompt_ids"])
    return logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


# ---- the sampler -----------------------------------------------------------------------------------------------------


def test_cold_samples_of_a_padded_batch_are_the_most_likely_tokens_of_each_prompt_alone():
    model, prompts = tiny_model(), prompt_ids()
    assert len(set(map(len, prompts))) > 1
    made = SAMPLER(model, prompts, n=2, temperature=1e-4, max_new_tokens=4, seed=0)
    for ids, completions in zip(prompts, made, strict=True):
        wanted = list(ids)
        for _ in range(4):
            wanted.append(model(torch.tensor([wanted])).logits[0, -1].argmax().item())
            if wanted[-1] == 1:
                break
        assert completions == [wanted[len(ids) :]] * 2


def test_samples_follow_the_policy_whatever_its_own_settings():
    model, prompts = tiny_model(), prompt_ids(1)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        wanted = model(torch.tensor(prompts)).logits[0, -1].div(2.0).softmax(-1)
    model.generation_config.top_k, model.generation_config.min_p = 1, 0.9
    draws = SAMPLER(model, prompts, n=4000, temperature=2.0, max_new_tokens=1, seed=1)[0]
    counted = torch.bincount(torch.tensor(draws).flatten(), minlength=len(wanted)) / 4000
    assert wanted.max() < 0.9
    assert (counted - wanted).abs().max() < 4 * 0.5 / 4000**0.5


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    config, settings = model.generation_config, model.generation_config.to_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = SAMPLER(model, prompt_ids(), n=2, temperature=1.0, max_new_tokens=6, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    assert config.to_dict() == settings
    torch.manual_seed(6)
    assert SAMPLER(model, prompt_ids(), n=2, temperature=1.0, max_new_tokens=6, seed=3) == first
    assert SAMPLER(model, prompt_ids(), n=2, temperature=1.0, max_new_tokens=6, seed=4) != first


def test_a_completion_ends_with_its_first_end_token():
    assert without_padding([4, 7, 2, 2], (1, 7), {1, 7, 2}) == [4, 7]
    assert without_padding([1, 1, 1], (1,), {1}) == [1]
    assert without_padding([3, 4], (1,), {1}) == [3, 4]


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [
        ([5, 1, 1, 1], [5, 1]),  # padded with the end token
        ([5, 1, 2, 2], [5, 1]),
        ([1, 2], [1]),
        ([5, 7, 2], [5, 7]),  # ended by another end token of the model
        ([5, 1, 6], [5, 1, 6]),  # it went on
        ([5, 6, 2], [5, 6, 2]),
        ([5, 6], [5, 6]),
    ],
)
def test_what_pads_a_completion_is_no_part_of_it(drawn, kept, tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 1]
    options = {"sampler": lambda model, prompts, n, **_: [[drawn] * n for _ in prompts]}
    trainer = online_trainer(tmp_path, model=model, max_new_tokens=4, trainer_options=options)
    ids = prompt_ids(2)
    assert trainer.online._sample(ids, 3, ("sample", 0)).completions == [[kept] * 3] * 2


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p: None, "sampler must return 2 lists, one a prompt, got NoneType"),
        (lambda p: [[[1]] * 3], "must return 2 lists, one a prompt, got 1"),
        (lambda p: [[[1]] * 3, [[1]]], "must return 3 completions of prompt 1, got 1"),
        (lambda p: [[[1], [1], []]] * 2, "must return completions of 1 to 5 tokens, got 0"),
        (lambda p: [[[1] * 6] * 3] * 2, "must return completions of 1 to 5 tokens, got 6"),
        (lambda p: [[[999]] * 3] * 2, "must return token ids from 0 to 269, got 999"),
    ],
)
def test_what_a_sampler_does_wrong_is_said(made, message, tmp_path):
    trainer = online_trainer(tmp_path, trainer_options={"sampler": lambda model, prompts, **_: made(prompts)})
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_what_fits():
    refused = {"sail_dp", "alol", "alol_seq", "alol_ref_free", "alol_kl", "ava_d", "ava_p"}
    assert refused <= set(METHODS) - set(FITTING)
    assert {"sail_pp", "sail_pr", "dpo", "var", "grpo", "ppo", "raft", "awr", "kto", "rebel"} <= set(FITTING)


@pytest.mark.parametrize("method", FITTING)
def test_trains(method, tmp_path):
    trainer = trained(tmp_path, method=method, iterations=2, steps_per_iteration=1)
    assert all(value == value and abs(value) < 1e6 for value in losses(trainer))
    assert len(losses(trainer)) == 2
    assert not torch.equal(trainer.model.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize("method", ["sail_pp", "sail_pr", "grpo"])
def test_repeats_itself_bit_for_bit(method, tmp_path):
    options = {"method": method, "iterations": 2, "steps_per_iteration": 1}
    first, again = trained(tmp_path / "1", **options), trained(tmp_path / "2", **options)
    assert losses(first) == losses(again)
    for ours, theirs in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert buffered(tmp_path / "1", 1)[0]["completions"] == buffered(tmp_path / "2", 1)[0]["completions"]


def test_another_seed_draws_others(tmp_path):
    trained(tmp_path / "1", iterations=1)
    trained(tmp_path / "2", iterations=1, seed=4)
    one, two = ({row["prompt"]: row["completions"] for row in buffered(tmp_path / n, 0)} for n in "12")
    shared = set(one) & set(two)
    assert shared
    assert all(one[prompt] != two[prompt] for prompt in shared)


def test_var_weighs_the_draws_of_a_prompt_by_their_rewards_alone(tmp_path):
    trainer = trained(tmp_path, method="var", iterations=1, lam=0.05, optim="sgd", learning_rate=0.1)
    model, rows = tiny_model(), buffered(tmp_path, 0)
    loss = 0.0
    for row in rows:
        weight = (torch.tensor(row["rewards"], dtype=torch.float64) / 0.05).softmax(0)
        loss = loss - sum(w * naive_logp(model, row, k).sum() for k, w in enumerate(weight)) / len(rows)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    moved = (tiny_model().lm_head.weight - trainer.model.lm_head.weight) / 0.1
    torch.testing.assert_close(moved.detach(), model.lm_head.weight.grad, rtol=1e-5, atol=1e-7)


def test_rows_of_an_item_are_known_before_anything_is_drawn(tmp_path):
    """For the dry run's memory: a prompt's completions where they are compared, else one, or a pair."""
    of_batch = {"advantages": "batch"}
    for method, options, rows in (("dpo", {}, 2), ("grpo", {}, 3), ("reinforce", of_batch, 1), ("reinforce", {}, 3),
                                  ("topr", {}, 1), ("var", {}, 3), ("sail_pp", {}, 2)):  # fmt: skip
        assert online_trainer(tmp_path, method=method, **options).online.rows_an_item == rows, method


def test_pairs_are_the_best_and_the_worst(tmp_path):
    trainer = trained(tmp_path, iterations=1, generations_per_prompt=4)
    rewards = trainer.train_dataset.rows.reward
    for chosen, rejected in trainer.train_dataset.items:
        group = trainer.train_dataset.rows.groups[chosen // 4]
        assert (rewards[chosen], rewards[rejected]) == (rewards[group].max(), rewards[group].min())


@pytest.mark.parametrize("refresh", [True, False])
def test_reference_and_old_log_probs_are_those_of_the_right_model(refresh, tmp_path):
    """In the second iteration: the policy that drew, and the reference, by full logits."""
    seen = []
    sampler = Recording(SAMPLER, lambda model: seen.append(copy.deepcopy(model)))
    trainer = trained(tmp_path, method="grpo", iterations=2, refresh_reference=refresh, sampling_batch_size=99,
                      trainer_options={"sampler": sampler})  # fmt: skip
    start, initial = seen[1], tiny_model()
    assert not torch.equal(start.lm_head.weight, initial.lm_head.weight)
    rows = trainer.train_dataset.rows
    change = []
    for number, row in enumerate(buffered(tmp_path, 1)):
        for k in range(3):
            index = rows.groups[number][k]
            item = rows.row(index)
            kept = item["labels"] != -100
            now, before = naive_logp(start, row, k), naive_logp(initial, row, k)
            torch.testing.assert_close(item["old_token_logp"][kept].double(), now, rtol=1e-5, atol=1e-5)
            wanted = now if refresh else before
            torch.testing.assert_close(item["ref_token_logp"][kept].double(), wanted, rtol=1e-5, atol=1e-5)
            assert item["ref_logp"].item() == pytest.approx(wanted.sum().item(), rel=1e-5)
            change.append((now - before).sum().item())
    logged = [entry["sample_kl"] for entry in trainer.state.log_history if "sample_kl" in entry]
    assert logged[0] == 0
    assert logged[1] == pytest.approx(sum(change) / len(change), rel=1e-4)
    assert abs(logged[1]) > 1e-3


# ---- the temperature of draws and log-probs --------------------------------------------------------------------------

READS_DRAWS = ["ppo", "grpo", "cispo", "sapo", "gspo", "reinforce", "vespo", "topr", "gvpo",
               "target_po", "astar_po", "rlol", "rgold", "weighted_bc",
               "sail_pp", "sail_pr", "var", "qrpo", "distill"]  # fmt: skip


@pytest.mark.parametrize("method", FITTING)
def test_log_probs_are_at_the_temperature_of_the_draws_where_these_stand_for_the_policy(method, tmp_path):
    config = online_trainer(tmp_path, method=method, sampling_temperature=0.6).args
    assert config.logp_temperature == (0.6 if method in READS_DRAWS else 1.0)
    assert online_trainer(tmp_path, method=method, logp_temperature=0.7).args.logp_temperature == 0.7


def tempered(model, row, completion, temperature):
    """fp64 log-probs of the completion's tokens by full logits."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][completion]])
    logp = (model(ids).logits.double() / temperature).log_softmax(-1)
    start = len(row["prompt_ids"])
    return logp[0, start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)


@pytest.mark.parametrize("live", [True, False], ids=["drawn at 0.6", "asked for 0.6"])
def test_policy_old_policy_and_reference_are_at_one_temperature(live, tmp_path):
    """And not at 1, by fp64 full logits, in the second iteration; the KL that is logged is that of what draws."""
    seen = []
    sampler = Recording(SAMPLER, lambda model: seen.append(copy.deepcopy(model)))
    options = {"sampling_temperature": 0.6} if live else {"logp_temperature": 0.6}
    trainer = trained(tmp_path, method="grpo", iterations=2, sampling_batch_size=99, refresh_reference=False,
                      trainer_options={"sampler": sampler}, **options)  # fmt: skip
    rows, change = trainer.train_dataset.rows, []
    for number, row in enumerate(buffered(tmp_path, 1)):
        for k in range(3):
            item = rows.row(rows.groups[number][k])
            kept = item["labels"] != -100
            now, before = (tempered(model, row, k, 0.6) for model in (seen[1], tiny_model()))
            torch.testing.assert_close(item["old_token_logp"][kept].double(), now, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(item["ref_token_logp"][kept].double(), before, rtol=1e-5, atol=1e-5)
            assert (tempered(seen[1], row, k, 1.0) - now).abs().max() > 0.01
            change.append((now - before).sum().item())
    logged = [entry["sample_kl"] for entry in trainer.state.log_history if "sample_kl" in entry]
    assert logged[1] == pytest.approx(sum(change) / len(change), rel=1e-4)


@pytest.mark.parametrize("method", ["grpo", "weighted_bc", "rlol"])
def test_the_step_is_that_of_the_tempered_policy(method, tmp_path):
    """The gradient of an on-policy step, by fp64 full logits: that of -A log pi_T, up to each method's factor."""
    options = {"beta": 0.0} if method == "grpo" else {}
    trainer = trained(tmp_path, method=method, iterations=1, sampling_temperature=0.6, optim="sgd", learning_rate=0.1,
                      steps_per_iteration=1, per_device_train_batch_size=4 if method == "grpo" else 12,
                      **options)  # fmt: skip
    model, loss = tiny_model(), 0.0
    for row in buffered(tmp_path, 0):
        reward = torch.tensor(row["rewards"], dtype=torch.float64)
        if method == "grpo":
            weight = (reward - reward.mean()) / (reward.std() + 1e-4) if reward.std() > 0 else reward * 0
        else:
            weight = reward.sigmoid()
        for k in range(3):
            logp = tempered(model, row, k, 0.6)
            loss = loss - weight[k] * (logp.mean() if method == "grpo" else logp.sum()) / 12
    loss.backward()
    moved = (tiny_model().lm_head.weight - trainer.model.lm_head.weight) / 0.1
    torch.testing.assert_close(moved.detach(), model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_an_offline_reference_at_another_temperature_is_not_read_from_the_cache(tmp_path):
    plain = tiny_trainer(tmp_path, method="grpo")
    warm = tiny_trainer(tmp_path, method="grpo", logp_temperature=0.6)
    assert plain.args.logp_temperature == 1.0
    assert not torch.equal(plain.train_dataset.rows.columns["ref_logp"], warm.train_dataset.rows.columns["ref_logp"])
    again = tiny_trainer(tmp_path, method="grpo")
    assert torch.equal(plain.train_dataset.rows.columns["ref_logp"], again.train_dataset.rows.columns["ref_logp"])


def test_temperatures_are_said_in_a_line(tmp_path, caplog):
    online_trainer(tmp_path / "1", method="grpo", sampling_temperature=0.6)
    assert "temperature 0.6: of the draws, and of the log-probs of policy and reference" in caplog.text
    caplog.clear()
    online_trainer(tmp_path / "2", method="dpo", sampling_temperature=0.6)
    assert "drawn at temperature 0.6, and the loss of 'dpo' reads log-probs at temperature 1" in caplog.text
    caplog.clear()
    online_trainer(tmp_path / "3", method="grpo")
    assert "temperature" not in caplog.text


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_refused(value, tmp_path):
    wanted = "a number, got nan" if math.isnan(value) else "finite and > 0"
    with pytest.raises(ValueError, match=f"logp_temperature must be {wanted}"):
        online_trainer(tmp_path, method="grpo", logp_temperature=value)


SETTINGS = {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
            "suppress_tokens": list(range(3, 100)), "temperature": 0.01, "typical_p": 0.2}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_settings_of_the_model_are_named_and_change_no_draw(name, tmp_path, caplog):
    draw = {"n": 3, "temperature": 1.0, "max_new_tokens": 6, "seed": 3}
    plain = SAMPLER(tiny_model(), prompt_ids(), **draw)
    model = tiny_model()
    setattr(model.generation_config, name, SETTINGS[name])
    assert SAMPLER(model, prompt_ids(), **draw) == plain
    online_trainer(tmp_path, method="grpo", model=model)
    assert f"generation settings {name}=" in caplog.text


def test_without_a_reference_no_copy_of_the_model_is_kept(tmp_path):
    kept = trained(tmp_path / "kept", iterations=2)
    assert kept.ref_model is not None
    bare = trained(tmp_path / "bare", iterations=2, keep_initial_model=False)
    assert bare.ref_model is None
    assert losses(bare) == losses(kept)
    assert not any("sample_kl" in entry for entry in bare.state.log_history)


def test_an_adapter_is_measured_against_the_bare_model(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trained(tmp_path, method="sail_pr", learning_rate=0.05, trainer_options={"peft_config": adapter})
    assert trainer.ref_model is None
    logged = [entry["sample_kl"] for entry in trainer.state.log_history if "sample_kl" in entry]
    assert logged[0] == 0
    assert abs(logged[2]) > 1e-3


def test_the_policy_labels_its_own_pairs_without_rewards(tmp_path):
    trainer = trained(tmp_path, method="sail_pp", reward_func=None, iterations=2)
    assert "rewards" not in buffered(tmp_path, 0)[0]
    assert not any("sample_reward_mean" in entry for entry in trainer.state.log_history)
    watched = trained(tmp_path / "watched", method="sail_pp", iterations=2)
    assert losses(watched) == losses(trainer)  # a reward given is logged, and no more
    assert "sample_reward_mean" in watched.state.log_history[0]


def test_the_better_answers_are_learned(tmp_path):
    trainer = trained(tmp_path, method="dpo", iterations=6, prompts_per_iteration=8, generations_per_prompt=6,
                      per_device_train_batch_size=8, learning_rate=3e-2, sampling_batch_size=48, steps_per_iteration=3,
                      keep_initial_model=False, reward_func=lambda p, c: [float(len(x)) for x in c])  # fmt: skip
    means = [entry["sample_reward_mean"] for entry in trainer.state.log_history if "sample_reward_mean" in entry]
    assert len(means) == 6
    assert means[-1] > means[0] + 1.0


# ---- labels, items, prompts ------------------------------------------------------------------------------------------


def drawn_pairs(rewards):
    return encode_drawn([Drawn("p", ["a", "b"], list(pair), "w", [3], [[4], [5]]) for pair in rewards], pairs=True)


def test_labels_are_drawn_from_the_difference_of_rewards():
    rows = drawn_pairs([(1.0, 0.0)] * 4000)
    label_pairs(rows, "draw", torch.Generator().manual_seed(0))
    kept = sum(group[0] < group[1] for group in rows.groups) / 4000
    assert kept == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_labels_by_the_higher_reward_draw_ties_alone():
    rows = drawn_pairs([(0.1, 0.0), (0.0, 0.1)] * 50 + [(1.0, 1.0)] * 100)
    label_pairs(rows, "higher", torch.Generator().manual_seed(0))
    assert [group[0] % 2 for group in rows.groups[:100]] == [0, 1] * 50
    assert 25 < sum(group[0] % 2 for group in rows.groups[100:]) < 75


def test_every_item_is_trained_on_equally_often():
    data = FixedLengthItems(10)
    items = [[place] for place in range(4)]
    data.fill(None, items, torch.Generator().manual_seed(0))
    assert len(data) == len(data.items) == 10
    assert {data.items.count(item) for item in items} == {2, 3}
    assert sorted(data.items[:4]) == sorted(data.items[4:8]) == items


def test_prompts_come_in_permutations_and_no_seed_comes_twice(tmp_path):
    sampler = Recording(SAMPLER)
    trained(tmp_path, iterations=6, trainer_options={"sampler": sampler})
    prompts = [row["prompt"] for iteration in range(6) for row in buffered(tmp_path, iteration)]
    for turn in range(3):
        assert sorted(prompts[8 * turn : 8 * turn + 8]) == sorted(row["prompt"] for row in PROMPTS)
    assert prompts[:8] != prompts[8:16]
    assert len({call["seed"] for call in sampler.calls}) == len(sampler.calls) == 12


def test_the_order_of_a_batch_does_not_hang_on_its_prompts_places(tmp_path):
    """Long prompts are drawn first; rows stand in the order of the prompts all the same."""
    rows = [{"prompt": "x" * n + " = "} for n in random.Random(0).sample(range(1, 20), 8)]
    trained(tmp_path, prompts=rows, iterations=1, prompts_per_iteration=8)
    for row in buffered(tmp_path, 0):
        assert tokenizer().decode(row["prompt_ids"], skip_special_tokens=True) == row["prompt"]
        for text, ids in zip(row["completions"], row["completion_ids"], strict=True):
            assert tokenizer().decode(ids, skip_special_tokens=True) == text
        assert row["rewards"] == reward(None, row["completions"])


def test_rows_with_completions_give_their_prompts_once(tmp_path):
    trainer = online_trainer(tmp_path, prompts=[*ROWS, *PROMPTS], method="sail_pp")
    assert len(trainer.online.prompts) == len(PROMPTS)


def test_long_prompts_keep_their_end(tmp_path, caplog):
    trainer = online_trainer(tmp_path, prompts=[{"prompt": "a b c d e f g h i j k l 7 = "}], max_length=12)
    assert "1 of 1 prompts were cut to their last 7 tokens" in caplog.text
    assert tokenizer().decode(trainer.online.prompts[0][2]).endswith(" 7 = ")
    trainer.train()


def test_messages_are_answered_by_messages(tmp_path):
    talker = copy.deepcopy(tokenizer())
    talker.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen = []

    def judge(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    from tests.tiny_training import tiny_config
    from var_kernels.integrations.trainer import VARTrainer

    prompt = [{"role": "user", "content": "1 + 1"}]
    config = tiny_config(tmp_path, method="dpo", online=True, iterations=1, max_steps=-1, prompts_per_iteration=1,
                         generations_per_prompt=4, max_new_tokens=4, max_length=64)  # fmt: skip
    VARTrainer(tiny_model(), config, [{"prompt": prompt}], processing_class=talker, reward_func=judge).train()
    assert all(p == prompt and c[0]["role"] == "assistant" for p, c in seen)
    ids = buffered(tmp_path, 0)[0]["prompt_ids"]
    assert tokenizer().decode(ids) == "<user>1 + 1<assistant>"


def test_the_buffer_is_a_data_set(tmp_path):
    trained(tmp_path, iterations=1)
    examples, problems = load_examples(tmp_path / "run/buffer/iteration-00000.jsonl", need_rewards="required")
    assert not problems
    assert [len(example.completions) for example in examples] == [3] * 4


def test_progress_is_shown_with_its_rate(tmp_path, capsys):
    trained(tmp_path, iterations=1, disable_tqdm=False)
    shown = capsys.readouterr().err
    for title in ("iteration 0: sampling", "rewards"):
        last = next(part for part in shown.split("\r") if part.strip().startswith(title))
        assert "%|" in last
        assert "/s]" in last


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match=r"sampler must be None without online training, .* pass online=True"):
        tiny_trainer(tmp_path, trainer_options={"sampler": SAMPLER})
    with pytest.raises(ValueError, match="ref_model must be None online with refresh_reference=True"):
        online_trainer(tmp_path, trainer_options={"ref_model": tiny_model(1)})
    trainer = online_trainer(
        tmp_path, refresh_reference=False, trainer_options={"ref_model": tiny_model(1)}, iterations=1
    )
    trainer.train()
    row, item = buffered(tmp_path, 0)[0], trainer.train_dataset.rows.row(0)
    assert item["ref_logp"].item() == pytest.approx(naive_logp(tiny_model(1), row, 0).sum().item(), rel=1e-5)


def test_sail_on_the_datas_responses_says_what_it_is(tmp_path, caplog):
    tiny_trainer(tmp_path, method="sail_pp")
    assert "sail_pp on the responses of a data set: its score term is that of responses drawn by the" in caplog.text


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    drawn = [
        Drawn("p", ["a", "a"], [1.0, 3.0], "w", [3], [[4, 5, 1], [4, 5, 1]]),
        Drawn("q", ["b", "c"], [0.0, -2.0], "w", [3], [[4, 6], [6, 6, 6, 1]]),
    ]
    found = measures(drawn, (1,))
    assert found["completion_length"] == 3.0
    assert found["unended_share"] == 0.25
    assert found["unique_share"] == 0.75
    assert found["distinct_2"] == 5 / 8  # 45 51 45 51 46 66 66 61
    assert found["sample_reward_mean"] == 0.5
    assert found["sample_reward_std"] == pytest.approx((13 / 4) ** 0.5)
    assert found["sample_reward_best"] == 1.5


def test_evaluation_draws_for_other_prompts(tmp_path):
    from tests.tiny_training import tiny_config
    from var_kernels.integrations.trainer import VARTrainer

    config = tiny_config(tmp_path, method="dpo", online=True, iterations=2, max_steps=-1, prompts_per_iteration=2,
                         max_new_tokens=4, eval_strategy="epoch", learning_rate=2.0)  # fmt: skip
    trainer = VARTrainer(
        tiny_model(), config, PROMPTS[:2], PROMPTS[2:], processing_class=tokenizer(), reward_func=reward
    )
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_sample_reward_mean" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert first["eval_sample_reward_mean"] != logged[-1]["eval_sample_reward_mean"]
    assert "eval_sample_reward_best" not in first
