"""Models by path: what an earlier run saved, an adapter among them."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, oracle_rows, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.trainer import VARTrainer, loading
from var_kernels.integrations.trainer.loading import load_causal_lm


@pytest.fixture
def adapter(tmp_path):
    """A folder with nothing but an adapter of tmp_path / "base", and the model that it makes."""
    peft = pytest.importorskip("peft")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = load_causal_lm(str(tmp_path / "base"))
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapters_path_is_the_model_that_it_makes_and_learns(adapter, tmp_path):
    path, expected = adapter
    loaded = load_causal_lm(str(path))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, expected(ids).logits, atol=1e-5)
        assert not torch.allclose(loaded(ids).logits, load_causal_lm(str(tmp_path / "base"))(ids).logits, atol=1e-2)
    trainer = VARTrainer(str(path), tiny_config(tmp_path, max_steps=2), ROWS)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").exists()
    reference = VARTrainer(
        str(tmp_path / "base"),
        tiny_config(tmp_path),
        ROWS,
        processing_class=tokenizer(),
        ref_model=str(path),
    )
    own = VARTrainer(str(path), tiny_config(tmp_path), ROWS, processing_class=str(path))
    assert torch.equal(reference.train_dataset.rows.columns["ref_logp"], own.train_dataset.rows.columns["ref_logp"])


# ---- an adapter of the lm_head or the embedding, tied or not ---------------------------------------------------------

LM_HEAD, EMBEDDING = "lm_head", "embed_tokens"
ADAPTERS = {  # id: options of a LoraConfig
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": [LM_HEAD]},
    "lm_head and attention": {"target_modules": ["q_proj", LM_HEAD]},
    "embedding": {"target_modules": [EMBEDDING]},
    "both": {"target_modules": [LM_HEAD, EMBEDDING]},
    "both, kept tied": {"target_modules": ["q_proj", EMBEDDING], "ensure_weight_tying": True},
    "DoRA on lm_head": {"target_modules": [LM_HEAD], "use_dora": True},
    "saved lm_head": {"target_modules": ["q_proj"], "modules_to_save": [LM_HEAD]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": [EMBEDDING]},
    "saved embedding, kept tied": {
        "target_modules": ["q_proj"], "modules_to_save": [EMBEDDING], "ensure_weight_tying": True,
    },
    "LoRA on one, the other saved": {"target_modules": [EMBEDDING], "modules_to_save": [LM_HEAD]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    "trainable tokens of the embedding": {
        "target_modules": ["q_proj"], "trainable_token_indices": {EMBEDDING: [5, 7]},
    },
    "rank-stabilised, with biases": {"target_modules": [LM_HEAD], "use_rslora": True, "bias": "all"},
}  # fmt: skip
IDS = torch.arange(3, 12)[None]


def adapted(folder, tied: bool, options: dict, tokens: int = 0, base=None):
    """A PEFT model whose trained parameters are far from where they began, saved in folder / "adapter"."""
    peft = pytest.importorskip("peft")
    if base is None:
        tiny_model(dtype=torch.float32, tie_word_embeddings=tied).save_pretrained(folder / "base")
        base = load_causal_lm(str(folder / "base"))
    if tokens:
        base.resize_token_embeddings(len(tokenizer()) + tokens)
    config = peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options})
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    tokenizer().save_pretrained(folder / "adapter")
    return model


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapters_path_is_the_adapted_model(case, tied, tmp_path):
    """And so is what is saved of it; the base is another."""
    model = adapted(tmp_path, tied, ADAPTERS[case])
    wanted = logits_of(model)
    bound = {"rtol": 0, "atol": 1e-5 * wanted.abs().max().item()}
    loaded = load_causal_lm(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded), wanted, **bound)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(load_causal_lm(str(tmp_path / "again"))), wanted, **bound)
    assert (logits_of(load_causal_lm(str(tmp_path / "base"))) - wanted).abs().max() > 100 * bound["atol"]
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_untouched_tie_stays(tied, tmp_path):
    adapted(tmp_path, tied, {"target_modules": "all-linear"})
    loaded = load_causal_lm(str(tmp_path / "adapter"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(("tied", "target"), [(True, "q_proj"), (True, LM_HEAD), (True, EMBEDDING), (False, "q_proj")])
def test_an_adapter_of_a_vocabulary_that_was_resized(tied, target, tmp_path):
    model = adapted(tmp_path, tied, {"target_modules": [target]}, tokens=6)
    wanted = logits_of(model)
    assert wanted.shape[-1] == len(tokenizer()) + 6
    torch.testing.assert_close(logits_of(load_causal_lm(str(tmp_path / "adapter"))), wanted, rtol=1e-5, atol=1e-4)


def test_an_adapter_of_a_merged_adapter(tmp_path):
    """The second run's base is what the first saved, not the first's base."""
    (tmp_path / "first").mkdir()
    adapted(tmp_path / "first", True, {"target_modules": ["q_proj", LM_HEAD]})
    base = load_causal_lm(str(tmp_path / "first" / "adapter"))
    model = adapted(tmp_path, True, {"target_modules": ["v_proj", LM_HEAD]}, base=base)
    wanted = logits_of(model)
    torch.testing.assert_close(logits_of(load_causal_lm(str(tmp_path / "adapter"))), wanted, rtol=1e-5, atol=1e-4)


def test_one_of_two_adapters_in_a_folder(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(tmp_path, True, {"target_modules": [LM_HEAD]})
    other = peft.LoraConfig(r=3, target_modules=[EMBEDDING, "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model.add_adapter("other", other)
    model.save_pretrained(tmp_path / "two")
    for name, folder in (("default", tmp_path / "two"), ("other", tmp_path / "two" / "other")):
        model.set_adapter(name)
        torch.testing.assert_close(logits_of(load_causal_lm(str(folder))), logits_of(model), rtol=1e-5, atol=1e-4)


def test_the_second_run_starts_from_what_the_first_saved(tmp_path):
    """Its reference is that model too: log-probs of its own full logits."""
    peft = pytest.importorskip("peft")
    tiny_model(dtype=torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=[LM_HEAD, EMBEDDING], task_type="CAUSAL_LM")
    options = {"max_steps": 4, "learning_rate": 5.0}
    first = VARTrainer(str(tmp_path / "base"), tiny_config(tmp_path, **options), ROWS, peft_config=lora)
    first.train()
    first.save_model()
    second = VARTrainer(str(tmp_path / "run"), tiny_config(tmp_path / "second"), ROWS)
    wanted = torch.stack([row[1] for row in oracle_rows(first.model.double(), ROWS)])
    found = second.train_dataset.rows.columns["ref_logp"].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    base = torch.stack([row[1] for row in oracle_rows(load_causal_lm(str(tmp_path / "base")).double(), ROWS)])
    assert (base - wanted).abs().max() > 0.05


@pytest.mark.parametrize("target", [LM_HEAD, EMBEDDING])
def test_the_live_reference_of_an_adapter_of_a_tied_model_is_the_bare_model(target, tmp_path):
    peft = pytest.importorskip("peft")
    histories = []
    for precompute in (True, False):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
        options = {"max_steps": 3, "learning_rate": 0.1, "precompute_ref_log_probs": precompute}
        trainer = VARTrainer(
            tiny_model(tie_word_embeddings=True), tiny_config(tmp_path / str(precompute), **options), ROWS,
            processing_class=tokenizer(), peft_config=lora,
        )  # fmt: skip
        trainer.train()
        histories.append([entry["kl_to_ref"] for entry in trainer.state.log_history if "kl_to_ref" in entry])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3, abs=1e-5)
    assert abs(histories[0][2]) > 1e-3


def test_a_run_on_a_merged_adapter_is_resumed_to_the_same_weights(tmp_path):
    adapted(tmp_path, True, {"target_modules": [LM_HEAD]})

    def run(**options):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        trainer = VARTrainer(str(tmp_path / "adapter"), tiny_config(tmp_path, **settings), ROWS)
        trainer.train(**options)
        return trainer.model

    straight = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not torch.equal(straight.lm_head.weight, straight.model.embed_tokens.weight)
    for made, wanted in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(made, wanted)


def bias_of_lora(folder):
    adapted(folder, True, {"target_modules": [LM_HEAD], "lora_bias": True})


def soft_prompt(folder):
    peft = pytest.importorskip("peft")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "base")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(load_causal_lm(str(folder / "base")), config).save_pretrained(folder / "adapter")


def lost_head_rows(folder):
    adapted(folder, False, {"target_modules": [EMBEDDING]}, tokens=6)


def lost_embedding_rows(folder):
    adapted(folder, False, {"target_modules": [LM_HEAD]}, tokens=6)


UNMERGEABLE = {
    bias_of_lora: "must be one that peft can merge into its base, got: Impossible to merge LoRA with `lora_bias=True`",
    soft_prompt: "must be one of weights, got PROMPT_TUNING",
    lost_head_rows: "must hold embedding and lm_head, since it was trained with 276 tokens, its base has 270, got",
    lost_embedding_rows: "must hold embedding and lm_head, since it was trained with 276 tokens, its base has 270",
}


@pytest.mark.parametrize("make", UNMERGEABLE, ids=lambda make: make.__name__)
def test_adapters_that_cannot_be_merged_are_refused(make, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"model: the adapter in .* {UNMERGEABLE[make]}"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_an_adapter_of_a_quantised_base_is_refused(tmp_path, monkeypatch):
    adapted(tmp_path, True, {"target_modules": ["q_proj"]})
    base = load_causal_lm(str(tmp_path / "base"))
    base.hf_quantizer = object()
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_args, **_options: base)
    with pytest.raises(ValueError, match="must not be quantised, since merging would round"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_the_model_card_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = VARTrainer(tiny_model(), tiny_config(tmp_path), ROWS, processing_class=tokenizer(), peft_config=config)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in text
    assert ", 192 of them, trained from" in text  # two layers, 2 x (24 + 24)
    assert "| lr_scheduler_type | constant |" in text
