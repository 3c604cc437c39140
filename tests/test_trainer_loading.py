"""Models by path: what an earlier run saved, an adapter among them."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.trainer import VARTrainer
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
