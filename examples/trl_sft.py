"""TRL's SFTTrainer with the fused head: TRL's loss and metrics, two lines more than before. Seconds on a CPU."""

import sys
import tempfile

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    print("skipped: pip install 'trl>=1.16' first")
    sys.exit()

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.from_scratch import train_tokenizer
from var_kernels.integrations.trl import FusedHeadMixin


class FusedSFTTrainer(FusedHeadMixin, SFTTrainer):
    pass


torch.manual_seed(0)
rows = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(8) for b in range(4)]
tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], 280)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder,
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = FusedSFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"SFT, 20 steps of TRL's own trainer, no logits made: loss {logged[0]:.3f} -> {logged[-1]:.3f}")
