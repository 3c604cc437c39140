"""An accelerate loop with the fused head: gradient accumulation that equals one large batch. Seconds on a CPU."""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.hf import fused_lm_head

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False
)
steps = 2  # of accumulation
accelerator = Accelerator(gradient_accumulation_steps=steps)
model = LlamaForCausalLM(config)
rows = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(2000, (32, 24))]
for n, row in enumerate(rows):
    row["labels"][: n % 12] = -100  # rows of different lengths, so that the mean of means would be another loss
loader = torch.utils.data.DataLoader(rows, batch_size=4)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

with fused_lm_head(model):
    batches = list(loader)
    for first in range(0, len(batches), steps):
        window = batches[first : first + steps]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        count = accelerator.reduce(count, reduction="sum")
        total = 0.0
        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=count).loss
                # accelerate divides by the number of steps, DDP by that of processes; count has both in it already.
                accelerator.backward(loss * steps * accelerator.num_processes)
                optimizer.step()
                optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), reduction="sum").item()
        accelerator.print(f"step {first // steps}  loss {total:.3f}")
