"""VARTrainer: references and their cache, adapters, reward functions, evaluation, checkpoints."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, losses, oracle_rows, oracle_var, tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.trainer import VARTrainer, reference
from var_kernels.integrations.trainer.record import METRICS_FILE

# ---- reference -------------------------------------------------------------------------------------------------------


def test_reference_log_probs_are_computed_once_and_read_back(tmp_path, monkeypatch):
    first = tiny_trainer(tmp_path)
    files = list((tmp_path / "cache").rglob("*"))
    assert [file.suffix for file in files if file.is_file()] == [".safetensors"]
    wanted = first.train_dataset.rows.columns["ref_logp"]
    oracle = torch.stack([row[1] for row in oracle_rows(first.model, ROWS)])
    torch.testing.assert_close(wanted.double(), oracle, rtol=1e-6, atol=1e-6, check_dtype=False)

    calls = []
    score_rows = reference.score_rows
    monkeypatch.setattr(reference, "score_rows", lambda *args: calls.append(1) or score_rows(*args))
    assert torch.equal(tiny_trainer(tmp_path).train_dataset.rows.columns["ref_logp"], wanted)
    assert not calls
    same_lengths = [{**row, "completions": [c.replace("x", "z") for c in row["completions"]]} for row in ROWS]
    for changed in ({"model": tiny_model(seed=1)}, {"rows": ROWS[1:]}, {"rows": same_lengths}, {"max_length": 8}):
        tiny_trainer(tmp_path, **changed)
        assert len(calls) == 1, changed
        calls.clear()


def test_a_damaged_cache_file_is_computed_anew(tmp_path):
    wanted = tiny_trainer(tmp_path).train_dataset.rows.columns["ref_logp"]
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:30])
    assert torch.equal(tiny_trainer(tmp_path).train_dataset.rows.columns["ref_logp"], wanted)
    assert file.read_bytes() == whole


def test_without_precomputing_the_losses_are_the_same(tmp_path):
    """The second step shows that the reference stays where the model was."""
    kept = tiny_trainer(tmp_path / "a", max_steps=3, reference="sum")
    kept.train()
    live = tiny_trainer(tmp_path / "b", max_steps=3, reference="sum", precompute_ref_log_probs=False)
    live.train()
    assert losses(live) == pytest.approx(losses(kept), rel=1e-6)
    assert live.state.log_history[2]["kl_to_ref"] == pytest.approx(kept.state.log_history[2]["kl_to_ref"], rel=1e-3)
    assert not (tmp_path / "b" / "cache").exists()


def test_a_reference_that_follows_the_policy(tmp_path):
    options = {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer = tiny_trainer(tmp_path, max_steps=3, ref_model_mixup_alpha=1.0, **options)
    trainer.train()
    logged = [entry["kl_to_ref"] for entry in trainer.state.log_history if "kl_to_ref" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-5)
    assert logged[1] > 1e-3
    assert logged[2] == pytest.approx(0, abs=1e-5)  # the second step moved it onto the policy


@pytest.mark.parametrize(("policy", "reference"), [(True, True), (True, False), (False, False)])
def test_a_reference_that_follows_a_tied_policy(policy, reference, tmp_path):
    """Onto it, weight by weight, whether the reference is tied or, made from the same, not."""
    models = [tiny_model(seed, tie_word_embeddings=tied) for seed, tied in ((0, policy), (1, reference))]
    options = {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2}
    given = {"ref_model": models[1]}
    trainer = tiny_trainer(
        tmp_path, model=models[0], max_steps=2, ref_model_mixup_alpha=1.0, trainer_options=given, **options
    )
    trainer.train()
    followed = dict(trainer.ref_model.named_parameters(remove_duplicate=False))
    for name, weight in trainer.model.named_parameters(remove_duplicate=False):
        assert torch.equal(followed[name], weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie_word_embeddings": True}, "tied to another weight in ref_model alone"),
        ({"attention_bias": True}, r"got model.layers.0.self_attn.k_proj.bias of shape None in the policy and \(24,\)"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused_before_training(options, message, tmp_path):
    sync = {"precompute_ref_log_probs": False, "sync_ref_model": True}
    given = {"ref_model": tiny_model(**options)}
    with pytest.raises(ValueError, match=f"sync_ref_model: .*{message}"):
        tiny_trainer(tmp_path, trainer_options=given, **sync)


def test_dropout_is_off_unless_asked_for(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    model.dropout_scale = 0.25  # a number of another meaning
    trainer = tiny_trainer(tmp_path, model=model, max_steps=1)
    assert model.dropout_scale == 0.25
    trainer.train()
    assert trainer.state.log_history[0]["kl_to_ref"] == pytest.approx(0, abs=1e-5)
    noisy = tiny_trainer(tmp_path, model=tiny_model(attention_dropout=0.5), max_steps=1, disable_dropout=False)
    noisy.train()
    assert abs(noisy.state.log_history[0]["kl_to_ref"]) > 1e-3


# ---- adapters, rewards, evaluation -----------------------------------------------------------------------------------


def test_lora_trains_the_adapter_against_the_bare_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    wanted = {name: param.detach().clone() for name, param in model.named_parameters()}
    bare = tiny_trainer(tmp_path / "bare").train_dataset.rows.columns["ref_logp"]
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = tiny_trainer(
        tmp_path, model=model, trainer_options={"peft_config": adapter}, max_steps=3, learning_rate=1.0
    )
    assert torch.equal(trainer.train_dataset.rows.columns["ref_logp"], bare)
    trainer.train()
    assert losses(trainer)[2] < losses(trainer)[0]
    for name, param in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            assert torch.equal(param, wanted[plain]), name
    trainer.save_model()
    saved = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved


def test_a_value_head_beside_a_saved_head_that_stays_tied(tmp_path):
    """PEFT's copy of the embedding says its sizes the wrong way round."""
    peft = pytest.importorskip("peft")
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    for method in ("dro", "alol"):
        model = tiny_model(tie_word_embeddings=True)
        trainer = tiny_trainer(tmp_path / method, model=model, method=method, trainer_options={"peft_config": adapter})
        trainer.train()
        assert trainer.extra_head.weight.shape == (1, 24)


def test_live_reference_of_an_adapter_is_the_bare_model(tmp_path):
    peft = pytest.importorskip("peft")
    histories = []
    for precompute in (True, False):
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        options = {"max_steps": 3, "learning_rate": 1.0, "precompute_ref_log_probs": precompute}
        trainer = tiny_trainer(tmp_path / str(precompute), trainer_options={"peft_config": adapter}, **options)
        trainer.train()
        histories.append([entry["kl_to_ref"] for entry in trainer.state.log_history if "kl_to_ref" in entry])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3, abs=1e-5)
    assert histories[0][2] > 1e-3


def test_a_reward_function_replaces_the_rewards(tmp_path):
    seen = []

    def digits(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(completion.isdigit()) for completion in completions]

    trainer = tiny_trainer(tmp_path, trainer_options={"reward_func": digits}, per_device_train_batch_size=24)
    assert seen == [(row["prompt"], completion) for row in ROWS for completion in row["completions"]]
    trainer.train()
    assert trainer.state.log_history[0]["reward_mean"] == pytest.approx(1 / 3)


def test_pairs_train_by_dpo_without_rewards_and_by_var_with_them(tmp_path):
    pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][2]} for r in ROWS]
    trainer = tiny_trainer(tmp_path / "dpo", pairs, method="dpo", max_steps=3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(trainer)[2] < losses(trainer)[0]
    graded = [{**pair, "chosen_reward": 1.0, "rejected_reward": 0.0} for pair in pairs]
    trainer = tiny_trainer(tmp_path / "var", graded, normalizer="group", reference="none", lam=0.5)
    trainer.train()
    # Two completions a prompt, weights sigmoid(2) and 1 - sigmoid(2).
    assert trainer.state.log_history[0]["weighted_reward"] == pytest.approx(0.8807971, rel=1e-5)


def test_forms_may_be_mixed_and_ties_make_no_pair(tmp_path, caplog):
    tie = {"prompt": "tie", "completions": ["a", "b"], "rewards": [1.0, 1.0]}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    single = {"prompt": "q", "completion": "a"}
    trainer = tiny_trainer(tmp_path / "dpo", [ROWS[0], tie, pair], method="dpo")
    assert trainer.train_dataset.items == [[0, 2], [5, 6]]
    assert "1 of 3 prompts have no two completions with different rewards" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["reward_mean"] == pytest.approx(0.5)  # of the two rows that have one
    trainer = tiny_trainer(tmp_path / "sft", [ROWS[0], tie, pair, single], method="sft")
    assert trainer.train_dataset.items == [[0], [3], [5], [7]]


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_mixed_precision_and_checkpointing_train_the_same(options, adapter, tmp_path):
    curves = []
    for extra in ({}, options):
        trainer_options = {}
        if adapter:
            peft = pytest.importorskip("peft")
            torch.manual_seed(0)
            lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer_options = {"peft_config": lora}
        settings = {"max_steps": 3, "learning_rate": 0.1, "per_device_train_batch_size": 24, **extra}
        model = tiny_model(dtype=torch.float32)
        trainer = tiny_trainer(tmp_path / str(len(extra)), model=model, trainer_options=trainer_options, **settings)
        trainer.train()
        curves.append(losses(trainer))
        assert abs(trainer.state.log_history[0]["kl_to_ref"]) < 0.02  # the reference is scored in the same precision
    assert curves[0] == pytest.approx(curves[1], rel=5e-3 if "bf16" in options else 1e-5)
    assert curves[1][2] < curves[1][0]


def test_evaluation_is_the_loss_of_each_batch_by_itself(tmp_path):
    config = tiny_config(tmp_path, per_device_eval_batch_size=24, reference="sum")
    trainer = VARTrainer(tiny_model(), config, ROWS[:2], ROWS, processing_class=tokenizer())
    metrics = trainer.evaluate()
    expected = oracle_var(trainer.model, ROWS, 0.5, "batch", "sum").item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    logged = trainer.state.log_history[-1]
    assert {"eval_ess", "eval_log_z", "eval_kl_to_ref"} <= set(logged)


def test_the_balancing_loss_of_experts_is_carried_over(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixture(**options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(
            vocab_size=len(tokenizer()),
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
            **sizes,
            **options,
        )
        return MixtralForCausalLM(config)

    plain = tiny_trainer(tmp_path / "plain", model=mixture(), per_device_train_batch_size=24)
    plain.train()
    model = mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    batch = plain.data_collator([plain.train_dataset[i] for i in range(24)])
    aux = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss.item()
    balanced = tiny_trainer(tmp_path / "balanced", model=model, per_device_train_batch_size=24)
    balanced.train()
    assert losses(balanced)[0] - losses(plain)[0] == pytest.approx(0.5 * aux, rel=1e-3)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"normalizer": "group", "gradient_accumulation_steps": 2}], ids=["batch", "group"]
)
def test_resuming_continues_the_same_curve(options, tmp_path):
    settings = {"per_device_train_batch_size": 3, "optim": "adamw_torch", "learning_rate": 1e-3, **options}
    straight = tiny_trainer(tmp_path / "straight", max_steps=8, **settings)
    straight.train()
    stopped = tiny_trainer(tmp_path / "cut", max_steps=8, save_strategy="steps", save_steps=4, **settings)
    stopped.train()
    checkpoint = str(tmp_path / "cut" / "run" / "checkpoint-4")
    resumed = tiny_trainer(tmp_path / "cut", max_steps=8, save_strategy="steps", save_steps=4, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(straight)
    for made, wanted in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(made, wanted)
    lines = (tmp_path / "cut" / "run" / METRICS_FILE).read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    assert [entry["loss"] for entry in entries] == losses(straight)


def test_half_a_line_at_the_end_of_the_metrics_is_dropped(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(tmp_path, **options).train()
    path = tmp_path / "run" / METRICS_FILE
    path.write_text(path.read_text() + '{"step": 2, "lo')
    tiny_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 4]


def test_a_moving_reference_is_resumed_too(tmp_path):
    options = {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 6}
    settings = {"save_strategy": "steps", "save_steps": 3, "reference": "sum", **options}
    straight = tiny_trainer(tmp_path, **settings)
    straight.train()
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed) == losses(straight)


def test_a_model_given_by_name_is_trained_in_fp32(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    trainer = VARTrainer(str(tmp_path / "model"), tiny_config(tmp_path), ROWS)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "rate", "lora", "warned"),
    [
        (torch.bfloat16, 1e-5, False, True),
        (torch.bfloat16, 1e-2, False, False),
        (torch.bfloat16, 1e-5, True, False),
        (torch.float16, 1e-5, True, False),
        (torch.float32, 1e-5, False, False),
    ],
)
def test_a_rate_that_bf16_weights_round_away_is_told(tmp_path, caplog, dtype, rate, lora, warned):
    """What the warning says is what happens to the weights."""
    options = {}
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        options["trainer_options"] = {"peft_config": adapter}
    settings = {"learning_rate": rate, "max_steps": 1, "warmup_steps": 0, "optim": "adamw_torch"}
    trainer = tiny_trainer(tmp_path, model=tiny_model(dtype=dtype), **settings, **options)
    learning = [p for p in trainer.model.parameters() if p.requires_grad and p.dim() == 2]
    before = [p.detach().clone() for p in learning]
    assert ("rounds to nothing" in caplog.text) == warned
    trainer.train()
    moved = max((a != b).float().mean() for a, b in zip(before, learning, strict=True))
    assert (moved < 0.5) == warned


@pytest.mark.parametrize("options", [{}, {"optim": "sgd"}, {"adam_epsilon": 1e-4}, {"lora": True}], ids=str)
def test_fp16_weights_are_refused_where_adam_divides_by_nothing(tmp_path, options):
    options = {"optim": "adamw_torch", **options}
    if options.pop("lora", False):
        peft = pytest.importorskip("peft")
        options["trainer_options"] = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    refused = options == {"optim": "adamw_torch"}
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got float16") if refused else nullcontext():
        tiny_trainer(tmp_path, model=tiny_model(dtype=torch.float16), **options)


def test_rows_beyond_the_positions_are_refused_where_a_table_ends(tmp_path, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer()), n_embd=24, n_layer=1, n_head=2, n_positions=16)
    rows = [{"prompt": "a b " * 10, "completion": "x" * n, "reward": float(n)} for n in (1, 20)]
    with pytest.raises(ValueError, match=r"max_length must be at most 16, the learned .* got a row of 32 tokens"):
        tiny_trainer(tmp_path, rows, model=GPT2LMHeadModel(config))
    tiny_trainer(tmp_path, rows, model=GPT2LMHeadModel(config), max_length=16).train()
    rotary = tiny_model()
    rotary.config.max_position_embeddings = 16
    tiny_trainer(tmp_path, rows, model=rotary).train()
    assert "the longest row has 32 tokens; the model was made for 16" in caplog.text


def test_the_model_card_holds_settings_and_last_metrics(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "by VAR on 24 completions (24 items), 2 steps" in text
    assert "| lam | 0.5 |" in text
    assert "| beta |" not in text
    assert f"| loss | {losses(trainer)[1]:.6g} |" in text


def test_the_model_card_counts_weights_that_are_held_in_parts(tmp_path):
    """As ZeRO-3 holds them: empty, with their own number of elements in ``ds_numel``."""
    trainer = tiny_trainer(tmp_path)
    for parameter in trainer.model.parameters():
        parameter.ds_numel, parameter.data = 1000, torch.empty(0)
    trainer.create_model_card()
    count = 1000 * len(list(trainer.model.parameters()))
    assert f"with {count:,} parameters, trained" in (tmp_path / "run" / "README.md").read_text()


def test_rewards_of_the_evaluation_set_are_standardised_as_those_of_the_training_set(tmp_path):
    rows = [{**row, "rewards": [10.0 + reward for reward in row["rewards"]]} for row in ROWS[:2]]
    trainer = tiny_trainer(tmp_path, method="dro", trainer_options={"eval_dataset": rows})
    train = torch.tensor([reward for row in ROWS for reward in row["rewards"]])
    wanted = (torch.tensor([reward for row in rows for reward in row["rewards"]]) - train.mean()) / train.std(
        correction=0
    )
    torch.testing.assert_close(trainer.eval_dataset.rows.columns["reward"], wanted)
    torch.testing.assert_close(trainer.train_dataset.rows.columns["reward"].std(correction=0), torch.tensor(1.0))
