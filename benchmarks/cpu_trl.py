"""A training step of TRL's SFTTrainer on a CPU: TRL's own head and FusedHeadMixin's.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_trl [--out FILE]

2 layers of width 512, 32000 ids, 4 x 512 tokens, none masked: forward and backward, without the optimizer's step.
Tokens per second of processor time: medians of 5 interleaved steps; peak MiB above the weights.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from benchmarks.cpu_machine import header, results_folder
from var_kernels.integrations.from_scratch import train_tokenizer
from var_kernels.integrations.trl import FusedHeadMixin
from var_kernels.measure import peak_extra_bytes

ROUNDS, SEQUENCES, TOKENS, VOCABULARY = 5, 4, 512, 32000


class FusedSFTTrainer(FusedHeadMixin, SFTTrainer):
    pass


def trainer(cls: type, dtype: torch.dtype, lora: bool, folder: str) -> SFTTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=8, **sizes)).to(dtype)
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS)).tolist()
    options = {"report_to": [], "save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    options |= {"per_device_train_batch_size": SEQUENCES, "max_length": TOKENS, "gradient_checkpointing": False}
    return cls(
        model=model,
        args=SFTConfig(folder, **options),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=train_tokenizer(["a b"], 280),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def measure(dtype: torch.dtype, lora: bool) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        sides = {"TRL": SFTTrainer, "FusedHeadMixin": FusedSFTTrainer}
        steps = {}
        for name, cls in sides.items():
            one = trainer(cls, dtype, lora, folder)
            batch = next(iter(one.get_train_dataloader()))
            tokens = torch.tensor(SEQUENCES * (TOKENS - 1))

            def step(one=one, batch=batch, tokens=tokens):
                one.training_step(one.model, dict(batch), tokens)
                one.model.zero_grad()

            steps[name] = step
        peaks = {name: peak_extra_bytes(step) / 2**20 for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)
    kind, what = str(dtype).removeprefix("torch."), "LoRA" if lora else "full"
    rates = {name: SEQUENCES * TOKENS / statistics.median(seconds[name]) for name in sides}
    return [[kind, what, name, f"{rates[name]:.0f}", f"{peaks[name]:.0f}"] for name in sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder() / "trl.csv", help="default: %(default)s")
    args = parser.parse_args()
    rows = [row for dtype in (torch.bfloat16, torch.float32) for lora in (False, True) for row in measure(dtype, lora)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        print(header(), file=file)
        csv.writer(file).writerows([["dtype", "weights", "head", "tokens_per_s", "peak_mib"], *rows])
    print(args.out.read_text())


if __name__ == "__main__":
    main()
