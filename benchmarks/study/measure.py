"""What is measured of a policy: sampled replies, their reward, diversity and distance; log-probs of given completions;
the memory of a step."""

import math
import time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks import small_world
from benchmarks.demo.replies import Drawn, Sampling, draw, reply_logps, rewards_of, summarise
from var_kernels.integrations.data import encode_examples, parse_row
from var_kernels.integrations.hf import sequence_logprobs
from var_kernels.integrations.trainer.collator import RowCollator

_CHUNK = 512  # sequences at once


def look(
    policy, reference, tokenizer, prompts: list[str], k: int, seed: int, limit: int, of_reference: Drawn | None = None
) -> dict:
    """Figures of k replies of at most ``limit`` tokens to each prompt, sampled at temperature 1.

    reward: points. kl: to the reference, nats a reply. length: tokens with the end token. distinct: different replies
    of a prompt, as a share of k. entropy: nats a reply, the mean of -log pi(y|x). With the reference's replies also
    win_rate (ties count half) and the checker's findings; reward, kl and win_rate with standard errors over prompts.
    """
    sampling = Sampling(_CHUNK, limit)
    drawn = draw(policy, tokenizer, prompts, k, sampling, small_world.reward, seed)
    logp_PK, ref_PK = (reply_logps(model, tokenizer, drawn, sampling) for model in (policy, reference))
    figures = {"reward": rewards_of(drawn).mean().item(), "kl": (logp_PK - ref_PK).mean().item()}
    if of_reference is not None:
        figures = summarise(drawn, of_reference, logp_PK - ref_PK) | small_world.found(drawn)
    return figures | {"entropy": -logp_PK.mean().item(), **_shape(drawn)}


def _shape(drawn: Drawn) -> dict:
    groups = [drawn.texts[i : i + drawn.k] for i in range(0, len(drawn.texts), drawn.k)]
    lengths = [len(ids) for ids in drawn.token_ids]
    return {
        "length": sum(lengths) / len(lengths),
        "distinct": sum(len(set(group)) for group in groups) / len(drawn.texts),
    }


def optimum(reference, tokenizer, prompts: list[str], k: int, seed: int, limit: int, lams: list[float]) -> list[dict]:
    """pi* at each lam, from k replies of the reference a prompt: reward, kl, entropy, and what reward - lam kl is."""
    sampling = Sampling(_CHUNK, limit)
    drawn = draw(reference, tokenizer, prompts, k, sampling, small_world.reward, seed)
    ref_PK, rewards_PK = reply_logps(reference, tokenizer, drawn, sampling).double(), rewards_of(drawn).double()
    points = small_world.frontier(drawn, lams)
    for point in points:
        w_PK = torch.softmax(rewards_PK / point["lam"], dim=1)
        point["entropy"] = -(w_PK * ref_PK).sum(1).mean().item() - point["kl"]  # log pi* = log pi_ref + r/lam - log Z
        point["objective"] = point["reward"] - point["lam"] * point["kl"]
    return points


class Texts:
    """Given completions, encoded once as the trainer encodes them."""

    def __init__(self, rows: list[dict], tokenizer, max_length: int):
        self.encoded = encode_examples([parse_row(row, "") for row in rows], tokenizer, max_length)
        self.collate = RowCollator(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows, device) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (B, T) of some rows."""
        batch = self.collate([[self.encoded.row(row)] for row in rows])
        return {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}

    @torch.no_grad()
    def logps(self, model, chunk: int = 256) -> Tensor:
        """(rows,) log-probs of the completions, nats, rows in the order of the data."""
        was_training, parts = model.training, []
        model.eval()
        for start in range(0, len(self), chunk):
            batch = self.batch(range(start, min(start + chunk, len(self))), model.device)
            parts.append(sequence_logprobs(model, batch).float().cpu())
        model.train(was_training)
        return torch.cat(parts)

    @property
    def lengths(self) -> Tensor:
        """(rows,) tokens of each completion."""
        return self.encoded.offset.diff() - self.encoded.prompt_length


def best_and_worst(rows: list[dict], count: int) -> list[dict]:
    """{"prompt", "chosen", "rejected"} of the first ``count`` prompts whose completions differ in reward."""
    pairs = []
    for row in rows:
        rewards = row["rewards"]
        if len(pairs) < count and max(rewards) > min(rewards):
            chosen, rejected = (row["completions"][rewards.index(pick(rewards))] for pick in (max, min))
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


class Probe(TrainerCallback):
    """Calls ``visit(model) -> dict`` at the given steps, and measures the memory of the second step. ``seconds`` are
    those of training without the looks and without that step: of the processor on the CPU, where other work may wait in
    between, else of the clock."""

    def __init__(self, steps: tuple[int, ...], visit, device: torch.device):
        self.steps, self.visit, self.device = frozenset(steps), visit, device
        self.curve: list[dict] = []
        self.clock = time.monotonic if device.type == "cuda" else time.process_time
        self.seconds = self.apart = 0.0
        self.peak_mib = math.nan
        self.profiler = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.began = self.clock()
        self._look(0, model)

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = self.clock() - self.began - self.apart

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:  # by now the optimiser has its state
            self.profiled = self.clock()
            self.profiler = StepMemory(self.device)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.peak_mib = self.profiler.stop()
            self.profiler = None
            self.apart += self.clock() - self.profiled
        self._look(state.global_step, model)

    def _look(self, step: int, model) -> None:
        if step not in self.steps:
            return
        began, was_training = self.clock(), model.training
        self.curve.append({"step": step, **self.visit(model)})
        model.train(was_training)
        self.apart += self.clock() - began


class StepMemory:
    """MiB allocated at once between construction and ``stop``, above what was held before: as ``peak_extra_bytes``, for
    a piece of work that cannot be called."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def stop(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        self.profiler.stop()
        events = (event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak / 2**20
