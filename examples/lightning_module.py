"""The fused head inside a LightningModule: the model's own loss, without logits. Seconds on a CPU."""

import sys

try:
    import lightning
except ImportError:
    print("skipped: pip install lightning first")
    sys.exit()

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.hf import fused_lm_head


class LanguageModel(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _index):
        loss = self.model(**batch).loss
        print(f"step {self.global_step}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False
)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2000, (8, 24))]
model = LlamaForCausalLM(config)
with fused_lm_head(model):
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(LanguageModel(model), torch.utils.data.DataLoader(rows, batch_size=4))
