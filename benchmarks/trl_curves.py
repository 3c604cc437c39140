"""TRL's trainers with and without FusedHeadMixin on TRL's own test rows: how far every logged number differs.

    python -m benchmarks.trl_curves [--rows FILE.json] [--out FILE] [--only WORD]

Rows: trl-internal-testing/zen from the hub, or {configuration: {"train": [...], "test": [...]}} in FILE.json. 20 steps
and two evaluations of a Qwen2 of two layers made from scratch, fp32, AdamW, on a CPU. A row of the CSV is a case and a
number: the largest relative difference over the steps, with the absolute one and TRL's value there.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import tempfile
import warnings
from pathlib import Path

import datasets
import torch
import transformers
import trl
from rich.progress import track
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.cpu_machine import RESULTS, header
from var_kernels.integrations.from_scratch import train_tokenizer
from var_kernels.integrations.trl import FusedHeadMixin

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAMPLED = {"num_generations": 4, "max_completion_length": 8, "per_device_eval_batch_size": 4}
# name: (trainer, configuration of the rows, options)
CASES = {
    "SFT, text": ("SFT", "standard_language_modeling", {}),
    "SFT, prompt and completion": ("SFT", "standard_prompt_completion", {}),
    "SFT, messages": ("SFT", "conversational_language_modeling", {}),
    "SFT, assistant's tokens": ("SFT", "conversational_language_modeling", {"assistant_only_loss": True}),
    "SFT, packed": ("SFT", "standard_language_modeling", {"packing": True, "max_length": 32, "num_train_epochs": 40}),
    "SFT, padding-free": ("SFT", "standard_language_modeling", {"padding_free": True, "max_length": None}),
    "SFT, accumulated": ("SFT", "standard_prompt_completion", {"gradient_accumulation_steps": 3}),
    "SFT, DFT": ("SFT", "standard_prompt_completion", {"loss_type": "dft"}),
    "DPO": ("DPO", "standard_preference", {}),
    "DPO, implicit prompt": ("DPO", "standard_implicit_prompt_preference", {}),
    "DPO, messages": ("DPO", "conversational_preference", {}),
    "KTO": ("KTO", "standard_unpaired_preference", {}),
    "KTO, messages": ("KTO", "conversational_unpaired_preference", {}),
    "GRPO": ("GRPO", "standard_prompt_only", SAMPLED),
    "GRPO, messages": ("GRPO", "conversational_prompt_only", SAMPLED),
    "GRPO, KL term, 2 iterations": ("GRPO", "standard_prompt_only", {**SAMPLED, "beta": 0.04, "num_iterations": 2}),
    "RLOO": ("RLOO", "standard_prompt_only", SAMPLED),
}


def hub_rows() -> dict:
    names = {rows for _, rows, _ in CASES.values()}
    loaded = {name: datasets.load_dataset("trl-internal-testing/zen", name) for name in names}
    return {name: {split: part.to_list() for split, part in splits.items()} for name, splits in loaded.items()}


def texts(value):
    """Every string in nested rows."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def length_reward(completions, **_):
    return [float(len(str(completion)) % 7) for completion in completions]


def logged(case: str, rows: dict, tokenizer, fuse: bool) -> list[dict[str, float]]:
    """Every number of the log that is not a time, entry by entry."""
    kind, name, options = CASES[case]
    trainer_class = getattr(trl, f"{kind}Trainer")
    if fuse:
        trainer_class = type(f"Fused{kind}Trainer", (FusedHeadMixin, trainer_class), {})
    tokenizer = copy.deepcopy(tokenizer)
    if name.startswith("conversational"):
        tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "eos", "bos")}
    settings = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "optim": "adamw_torch"}
    settings |= {"lr_scheduler_type": "constant", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 10}
    settings |= {"per_device_eval_batch_size": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3}
    settings |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        saved = f"{folder}/model"  # TRL loads its reference by name
        torch.manual_seed(0)
        Qwen2ForCausalLM(
            Qwen2Config(vocab_size=1000, num_key_value_heads=2, initializer_range=0.1, **sizes, **ids)
        ).save_pretrained(saved)
        torch.manual_seed(7)
        trainer = trainer_class(
            model=Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.float32),
            args=getattr(trl, f"{kind}Config")(f"{folder}/run", **{**settings, **options}),
            train_dataset=datasets.Dataset.from_list(rows[name]["train"]),
            eval_dataset=datasets.Dataset.from_list(rows[name]["test"] * 2),
            processing_class=tokenizer,
            **({"reward_funcs": length_reward} if options.get("num_generations") else {}),
        )
        trainer.train()
    no_times = ("time", "second")
    return [
        {k: float(v) for k, v in entry.items() if isinstance(v, int | float) and not any(w in k for w in no_times)}
        for entry in trainer.state.log_history
    ]


def differences(case: str, theirs: list[dict], ours: list[dict]) -> list[tuple]:
    """(case, number, its largest relative difference, the absolute one there, TRL's value there)."""
    worst: dict[str, tuple] = {}
    for own, fused in zip(theirs, ours, strict=True):
        if own.keys() != fused.keys():
            raise SystemExit(f"{case}: different numbers are logged: {sorted(own.keys() ^ fused.keys())}")
        for name, value in own.items():
            if math.isnan(value) and math.isnan(fused[name]):
                continue
            absolute = abs(value - fused[name])
            relative = absolute / abs(value) if value else math.inf if absolute else 0.0
            if relative >= worst.get(name, (-1.0,))[0]:
                worst[name] = relative, absolute, value
    return [(case, name, *(f"{x:.3g}" for x in found)) for name, found in sorted(worst.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a JSON file in place of the hub")
    parser.add_argument("--only", default="", help="cases with this word in their name")
    parser.add_argument("--out", type=Path, default=RESULTS / "trl" / "curves.csv", help="default: %(default)s")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = json.loads(args.rows.read_text()) if args.rows else hub_rows()
    tokenizer = train_tokenizer(sorted(set(texts(rows))), 600)
    found = []
    for case in track([case for case in CASES if args.only in case], description="20 steps twice"):
        found += differences(case, *(logged(case, rows, tokenizer, fuse) for fuse in (False, True)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        print(
            header().replace("; processor time", f" transformers={transformers.__version__} trl={trl.__version__}"),
            file=file,
        )
        csv.writer(file).writerows([["case", "number", "relative", "absolute", "value"], *found])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
