"""Reward models: Bradley-Terry and AVA trained and judged, their rewards and those of a classifier, what is refused."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_online import PROMPTS, buffered, online_trainer
from tests.tiny_training import ROWS, losses, tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.data import DataError, encode_examples, parse_row
from var_kernels.integrations.hf.heads import RewardHead, ValueHead, load_head
from var_kernels.integrations.trainer import VARTrainer
from var_kernels.integrations.trainer.reward_model import RewardModel
from var_kernels.integrations.trainer.rewards import apply_reward_function

# The better answer is the one with digits.
PAIRS = [
    {"prompt": row["prompt"], "chosen": f"{number}{number + 1}", "rejected": "x" * (1 + number % 3) + "u"}
    for number, row in enumerate(ROWS)
]
TEXTS = [(row["prompt"], text) for row in ROWS[:3] for text in row["completions"]]


def naive_mu(model, head, prompt, completion):
    """mu of the state before the end token, one unpadded row at a time."""
    rows = encode_examples([parse_row({"prompt": prompt, "completion": completion}, "")], tokenizer(), 64)
    ids = rows.row(0)["input_ids"][None]
    hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -2]
    return head.weight[0].to(hidden) @ hidden + head.bias[0].to(hidden)


def judged_trainer(folder, method="bradley_terry", **options):
    settings = {"optim": "adamw_torch", "learning_rate": 3e-3, "head_learning_rate": 0.02} | options
    config = tiny_config(folder, method=method, **settings)
    return VARTrainer(tiny_model(), config, PAIRS[:6], PAIRS[6:], processing_class=tokenizer())


# ---- training --------------------------------------------------------------------------------------------------------


def test_bradley_terrys_step_is_the_naive_one(tmp_path):
    trainer = tiny_trainer(tmp_path, PAIRS, method="bradley_terry", learning_rate=0.1, head_learning_rate=0.2)
    model, head = tiny_model(), RewardHead(24).double()
    for module in (head, trainer.extra_head):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 1, 48).view(2, 24))
    start = head.weight.detach().clone()
    margins = [
        naive_mu(model, head, r["prompt"], r["chosen"]) - naive_mu(model, head, r["prompt"], r["rejected"])
        for r in PAIRS
    ]
    loss = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["pair_accuracy"] == pytest.approx(sum(m.item() > 0 for m in margins) / 8)
    assert "nll_per_token" not in logged
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (tiny_model().get_parameter(name) - trainer.model.get_parameter(name)) / 0.1
    torch.testing.assert_close(moved.detach(), model.get_parameter(name).grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close((start - trainer.extra_head.weight) / 0.2, head.weight.grad, rtol=1e-4, atol=1e-6,
                               check_dtype=False)  # fmt: skip


def test_pairs_held_out_are_judged(tmp_path):
    trainer = judged_trainer(tmp_path, max_steps=40, per_device_train_batch_size=6)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_pair_accuracy"] == 0.0  # a new head knows no difference
    trainer.train()
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_pair_accuracy"] == 1.0
    assert trainer.state.log_history[-1]["eval_loss"] < 0.4


def test_ava_from_demonstrations_is_judged_by_pairs_too(tmp_path):
    trainer = judged_trainer(tmp_path, method="ava_d", max_steps=2)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_pair_accuracy"] == 0.5  # ties count half
    trainer.train()
    trainer.evaluate()
    judged = [
        [naive_mu(trainer.model, trainer.extra_head, row["prompt"], row[which]) for which in ("chosen", "rejected")]
        for row in PAIRS[6:]
    ]
    right = [chosen > rejected for chosen, rejected in judged]
    assert trainer.state.log_history[-1]["eval_pair_accuracy"] == sum(right) / 2


@pytest.mark.parametrize("method", ["bradley_terry", "ava_p"])
def test_what_was_trained_gives_its_rewards(method, tmp_path):
    trainer = judged_trainer(tmp_path, method=method, max_steps=5)
    trainer.train()
    trainer.save_model()
    made = RewardModel.from_pretrained(tmp_path / "run", dtype=torch.float64, batch_size=4)
    rewards = made(*zip(*TEXTS, strict=True))
    model, head = trainer.model, load_head(tmp_path / "run")
    wanted = [naive_mu(model, head, prompt, text).item() for prompt, text in TEXTS]
    assert rewards == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert len({round(value, 6) for value in rewards}) > 3
    assert not any(parameter.requires_grad for parameter in made.model.parameters())


def test_a_reward_model_scores_what_the_policy_draws(tmp_path):
    judge = judged_trainer(tmp_path / "judge", max_steps=5)
    judge.train()
    judge.save_model()
    model = RewardModel.from_pretrained(tmp_path / "judge" / "run")
    online_trainer(tmp_path, PROMPTS, iterations=1, reward_func=model).train()
    for row in buffered(tmp_path, 0):
        assert row["rewards"] == pytest.approx(model([row["prompt"]] * 3, row["completions"]), rel=1e-5)


# ---- classifiers -----------------------------------------------------------------------------------------------------


def classifier(num_labels=1, **options):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, num_labels=num_labels, pad_token_id=None, **sizes, **options)
    return LlamaForSequenceClassification(config)


def saved(folder, model, tokens=None):
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_classifiers_rewards_are_its_logits(batch_size, tmp_path):
    made = RewardModel.from_pretrained(saved(tmp_path, classifier()), batch_size=batch_size)
    rows = encode_examples([parse_row({"prompt": p, "completion": c}, "") for p, c in TEXTS], tokenizer(), 64)
    wanted = [classifier()(rows.row(row)["input_ids"][None]).logits.item() for row in range(len(rows))]
    assert made(*zip(*TEXTS, strict=True)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_plain_text_may_be_wrapped_in_messages(tmp_path):
    import copy

    talker = copy.deepcopy(tokenizer())
    talker.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = RewardModel(classifier(), talker, as_chat=True)
    ids = tokenizer()("<user>1 + 1<assistant>2", add_special_tokens=False)["input_ids"]
    halves = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in ("<user>1 + 1<assistant>", "2")]
    assert [*halves[0], *halves[1]] == ids
    wanted = classifier()(torch.tensor([ids])).logits.item()
    assert made(["1 + 1"], ["2"]) == pytest.approx([wanted], rel=1e-5)
    messages = [{"role": "user", "content": "1 + 1"}], [{"role": "assistant", "content": "2"}]
    assert RewardModel(classifier(), talker)([messages[0]], [messages[1]]) == pytest.approx([wanted], rel=1e-5)


def test_a_tokenizer_with_a_separator_gets_the_pair():
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789+=x"]
    tokens = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokens), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8, num_labels=1)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    texts = [("1 + 2 =", "3"), ("1 + 2 =", "x x x x"), ("5 =", "5")]
    wanted = [model(**tokens(p, c, return_tensors="pt")).logits.item() for p, c in texts]
    made = RewardModel(model, tokens, batch_size=2)(*zip(*texts, strict=True))
    assert made == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_tokenizer_with_a_separator_cuts_equal_prompts_alike():
    """Both completions are scored behind the newest tokens of the prompt that the longer one leaves room for."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789+=x"]
    tokens = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    config = BertConfig(vocab_size=len(tokens), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8, num_labels=1)  # fmt: skip
    made = RewardModel(BertForSequenceClassification(config).eval(), tokens, max_length=13)
    digits = " ".join("0123456789")
    long = ("x " * 20).strip()
    pairs = made._text_pairs([digits, digits, "1", "2"], ["3", "x x x x", long, "3"])
    kept = [tokens.decode(pair["input_ids"]) for pair in pairs]
    six = " ".join("456789")
    assert kept[:2] == [f"[CLS] {six} [SEP] 3 [SEP]", f"[CLS] {six} [SEP] x x x x [SEP]"]
    assert kept[2:] == [f"[CLS] 1 [SEP] {'x ' * 9}[SEP]", "[CLS] 2 [SEP] 3 [SEP]"]
    whole = tokens("2", "3")
    assert pairs[3] == {name: whole[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    made([digits], [long])  # whatever the last call has set
    assert made._text_pairs(["2"], ["3"]) == pairs[3:]


# ---- refusals --------------------------------------------------------------------------------------------------------


def value_model(folder):
    saved(folder, tiny_model(dtype=torch.float32))
    ValueHead(24, per="sequence").save_pretrained(folder)


REFUSED = {
    "nowhere": (lambda f: None, FileNotFoundError, "reward model must be an existing folder"),
    "a causal LM": (lambda f: saved(f, tiny_model(dtype=torch.float32)), ValueError,
                    "must be a trained classifier, got .* score.weight would be random"),
    "two labels": (lambda f: saved(f, classifier(2)), ValueError, "a classifier with one label, got 2 labels"),
    "a value head": (value_model, ValueError, "must hold a RewardHead, got a ValueHead"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_reward_model_is_refused(build, kind, message, tmp_path):
    build(tmp_path / "model")
    with pytest.raises(kind, match=message):
        RewardModel.from_pretrained(tmp_path / "model")


def test_settings_out_of_range():
    for options, message in (
        ({"as_chat": True}, "as_chat needs a tokenizer with a chat template"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"max_length": 1}, "max_length must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardModel(classifier(), tokenizer(), **options)


def test_a_reward_that_is_not_finite_names_its_rows(tmp_path):
    model = classifier()
    token = tokenizer()("q", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    examples = [parse_row({"prompt": f"{n} ", "completion": "q" if n == 2 else "3"}, f"file:{n}") for n in range(4)]
    with pytest.raises(DataError, match="file:2: the reward function must return finite fp32 numbers, got nan"):
        apply_reward_function(RewardModel(model, tokenizer()), examples)


def test_messages_without_a_template_name_their_rows():
    message = [{"role": "user", "content": "hi"}]
    example = parse_row({"prompt": message, "completion": message}, "file:7")
    with pytest.raises(DataError, match=r"file:7: the reward function raised DataError: .*chat template"):
        apply_reward_function(RewardModel(classifier(), tokenizer()), [example])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "a"}], "reward must be in the data"),
        ([{"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 1.0]}], "needs pairs"),
        ([{"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, float("nan")]}], "must be finite, got nan"),
    ],
)
def test_data_that_hold_no_pair_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, rows, method="bradley_terry")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_a_judge_and_uses_it(tmp_path, capsys):
    from var_kernels.cli import main

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    common = ["--from-scratch", "hidden=16,layers=1,heads=2,vocab=270", "--max-length", "32", "--logging-steps", "1",
              "--use-cpu", "--disable-tqdm", "--cache-dir", str(tmp_path / "cache")]  # fmt: skip
    judge = ["--method", "bradley_terry", "--dataset", str(tmp_path / "pairs.jsonl"), "--max-steps", "2",
             "--eval-dataset", str(tmp_path / "pairs.jsonl"), "--eval-strategy", "epoch",
             "--output-dir", str(tmp_path / "judge")]  # fmt: skip
    assert main(["train", *common, *judge]) == 0
    logged = [json.loads(line) for line in (tmp_path / "judge" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_pair_accuracy" in entry for entry in logged)
    policy = ["--method", "dpo", "--online", "true", "--iterations", "2", "--prompts-per-iteration", "4",
              "--max-new-tokens", "4", "--generations-per-prompt", "3", "--reward-model", str(tmp_path / "judge"),
              "--dataset", str(tmp_path / "prompts.jsonl"), "--output-dir", str(tmp_path / "policy")]  # fmt: skip
    assert main(["train", *common, *policy]) == 0, capsys.readouterr().err
    logged = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert sum("sample_reward_mean" in entry for entry in logged) == 2
    assert "dpo" in (tmp_path / "policy" / "README.md").read_text()
