"""TRL's GRPOTrainer with the fused head: TRL's loss and metrics, two lines more than before. Seconds on a CPU."""

import sys
import tempfile

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    print("skipped: pip install 'trl>=1.16' first")
    sys.exit()

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.from_scratch import train_tokenizer
from var_kernels.integrations.trl import FusedHeadMixin


class FusedGRPOTrainer(FusedHeadMixin, GRPOTrainer):
    pass


def share_of_digits(completions, **_columns):
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


torch.manual_seed(0)
rows = [{"prompt": f"{a} + {b} = "} for a in range(8) for b in range(4)]
tokenizer = train_tokenizer([row["prompt"] for row in rows], 280)
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
    arguments = GRPOConfig(
        folder,
        max_steps=20,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = FusedGRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=share_of_digits,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"GRPO, 20 steps of TRL's own trainer, no logits made: reward {logged[0]:.3f} -> {logged[-1]:.3f}")
