"""Which model is better? Completions of held-out prompts, scored, and how far each model has gone from the reference.

python examples/compare_models.py --prompts held_out.jsonl --reward my_rewards:score --reference base runs/var runs/dpo

For each model, with the standard error over prompts: the mean reward of its completions; the share of them that beat
the reference's (a tie counts half); KL(model, reference), the mean of log pi - log pi_ref, nats per completion.
"""

import argparse

import torch
from transformers import AutoTokenizer

from var_kernels.integrations.data import Example, load_examples
from var_kernels.integrations.hf import sequence_logprobs
from var_kernels.integrations.trainer import RewardModel
from var_kernels.integrations.trainer.loading import load_causal_lm
from var_kernels.integrations.trainer.online import GenerateSampler
from var_kernels.integrations.trainer.online.draws import prompts_of
from var_kernels.integrations.trainer.rewards import apply_reward_function, load_rewards

parser = argparse.ArgumentParser(description="Mean reward, win rate and KL of models against a reference.")
parser.add_argument("models", nargs="+", help="names or paths, adapters among them")
parser.add_argument("--reference", required=True, help="the model that training began with; its tokenizer serves all")
parser.add_argument("--prompts", required=True, help="rows of docs/data.md; completions in them are not read")
parser.add_argument("--reward", help="module:function, called with (prompts, completions)")
parser.add_argument("--reward-model", help="a reward model's path, in place of --reward")
parser.add_argument("--draws", type=int, default=4, help="completions of each prompt (default 4)")
parser.add_argument("--max-new-tokens", type=int, default=128)
parser.add_argument("--max-length", type=int, default=1024)
parser.add_argument("--batch", type=int, default=32, help="completions at once (default 32)")
args = parser.parse_args()
if bool(args.reward) == bool(args.reward_model):
    parser.error("give one of --reward and --reward-model")

device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
score = load_rewards(args.reward) if args.reward else RewardModel.from_pretrained(args.reward_model)
tokenizer = AutoTokenizer.from_pretrained(args.reference)
pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
examples, _ = load_examples(args.prompts, need_rewards="prompt")
prompts = prompts_of(examples, tokenizer, args, score)


def parts(items: list) -> list[list]:
    size = max(1, args.batch // args.draws)
    return [items[start : start + size] for start in range(0, len(items), size)]


def draw(model) -> list[list[list[int]]]:
    """args.draws completions (token ids) of each prompt, at temperature 1."""
    sampler, options = GenerateSampler.of(model, tokenizer, pad), {"n": args.draws, "temperature": 1.0}
    drawn = []
    for seed, part in enumerate(parts(prompts)):
        drawn += sampler(
            model, [prompt.ids for prompt in part], max_new_tokens=args.max_new_tokens, seed=seed, **options
        )
    return drawn


def rewards(drawn) -> torch.Tensor:  # (prompts, draws)
    scored = []
    for prompt, row in zip(prompts, drawn, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row]
        said = [text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}] for text in texts]
        scored.append(Example(prompt.text, said, None, [prompt.where] * len(row), columns=[prompt.columns] * len(row)))
    scored = apply_reward_function(score, scored, completion_ids=[ids for row in drawn for ids in row].__getitem__)
    return torch.tensor([example.rewards for example in scored])


@torch.no_grad()
def logps(model, drawn) -> torch.Tensor:  # (prompts, draws), nats per completion
    result = []
    for part in parts(list(zip(prompts, drawn, strict=True))):
        rows = [(prompt.ids, completion) for prompt, completions in part for completion in completions]
        width = max(len(ids) + len(completion) for ids, completion in rows)
        batch = {"input_ids": torch.full((len(rows), width), pad), "labels": torch.full((len(rows), width), -100)}
        batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.int64)
        for n, (ids, completion) in enumerate(rows):
            end = len(ids) + len(completion)
            batch["input_ids"][n, :end] = torch.tensor([*ids, *completion])
            batch["labels"][n, len(ids) : end] = torch.tensor(completion)
            batch["attention_mask"][n, :end] = 1
        result.append(sequence_logprobs(model, {key: value.to(device) for key, value in batch.items()}).cpu())
    return torch.cat(result).view(-1, args.draws)


def shown(values: torch.Tensor, scale: float = 1.0) -> str:
    """Mean and standard error over prompts of (prompts, draws)."""
    means = values.mean(1) * scale
    error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return f"{means.mean().item():8.2f} ± {error:.2f}"


reference = load_causal_lm(args.reference).to(device).eval()
base = rewards(draw(reference))
width = max(map(len, (*args.models, args.reference)))
print(f"{'model':{width}}  {'reward':>15}  {'wins, %':>15}  {'KL, nats':>15}")
print(f"{args.reference:{width}}  {shown(base):>15}")
for name in args.models:
    model = load_causal_lm(name).to(device).eval()
    drawn = draw(model)
    own, kl = rewards(drawn), logps(model, drawn) - logps(reference, drawn)
    wins = (own > base).float() + 0.5 * (own == base).float()
    print(f"{name:{width}}  {shown(own):>15}  {shown(wins, 100):>15}  {shown(kl):>15}", flush=True)
