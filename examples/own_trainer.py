"""The fused head inside transformers.Trainer: the model's own loss, without logits. One line more than before."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from var_kernels.integrations.hf import fused_lm_head

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False
)
model = LlamaForCausalLM(config)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2000, (16, 24))]

with tempfile.TemporaryDirectory() as folder, fused_lm_head(model):
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"4 steps of transformers' own trainer, no logits made: loss {logged[0]:.3f} -> {logged[-1]:.3f}")
