"""A student learns its teacher's distributions: python examples/distill.py TEACHER texts.txt --layers 6

The student is the teacher without its last layers. Every line of the file is a text; the KL per token should fall.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from var_kernels.integrations.hf import distillation_loss

parser = argparse.ArgumentParser(description="Distils a causal LM into its own first layers.")
parser.add_argument("teacher", help="name or path")
parser.add_argument("texts", type=Path, help="a text a line")
parser.add_argument("--layers", type=int, required=True, help="of the student")
parser.add_argument("--direction", default="forward", choices=("forward", "reverse", "jsd"))
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--max-length", type=int, default=256)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.teacher)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher).eval().requires_grad_(False)
student = copy.deepcopy(teacher).train().requires_grad_(True)
student.model.layers = student.model.layers[: args.layers]
student.config.num_hidden_layers = args.layers
optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
losses = []
for step, text in enumerate(filter(str.strip, args.texts.read_text().splitlines())):
    batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.max_length)
    loss = distillation_loss(student, teacher, {**batch, "labels": batch["input_ids"]}, direction=args.direction)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step}: {args.direction} divergence {loss.item():.4f} nats per token", flush=True)
print(f"a student of {args.layers} layers, {len(losses)} steps: {losses[0]:.4f} -> {losses[-1]:.4f} nats per token")
