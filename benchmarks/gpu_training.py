"""Whole work instead of single calls: a batch with real lengths and masks, and a training step of a whole model."""

import csv
import functools
import gc
import time
from pathlib import Path

import torch

from benchmarks import gpu_compare
from benchmarks.gpu_providers import IGNORED, PROVIDERS, obstacle
from benchmarks.gpu_timing import MIB, Item
from var_kernels import VARLoss

LENGTHS = Path(__file__).parent / "data" / "alpaca_eval_lengths.csv"
LONGEST = 1024


def lengths(sequences: int, longest: int = LONGEST) -> list[tuple[int, int]]:
    """(prompt, completion) token counts, cut to the longest sequence."""
    rows = csv.DictReader(LENGTHS.read_text().splitlines()[1:])
    pairs = [(int(row["prompt"]), int(row["completion"])) for row in rows][:sequences]
    return [(min(p, longest - 1), min(c, longest - min(p, longest - 1))) for p, c in pairs]


def batch_labels(pairs: list[tuple[int, int]], v: int, device, packed: bool) -> torch.Tensor:
    """Labels of the next token, aligned with hidden: ignored in the prompt (but for its last token) and the padding.
    (B, T), or (N,) packed.
    """
    width = max(p + c for p, c in pairs)
    rows = []
    for prompt, completion in pairs:
        labels = torch.randint(0, v, (prompt + completion,))
        labels[: prompt - 1] = IGNORED
        labels[-1] = IGNORED  # nothing follows
        rows.append(labels if packed else torch.nn.functional.pad(labels, (0, width - len(labels)), value=IGNORED))
    return (torch.cat(rows) if packed else torch.stack(rows)).to(device)


def _batch(bench, name: str, packed: bool) -> list[dict]:
    sequences, d, v = (4, 16, 200) if bench.dry_run else (32, 2048, 128256)
    pairs = lengths(sequences, 24 if bench.dry_run else LONGEST)
    torch.manual_seed(0)
    labels = batch_labels(pairs, v, bench.device, packed)
    about = {"provider": name, "layout": "packed" if packed else "padded", "rows": labels.numel()}
    about["active"] = int((labels != IGNORED).sum())
    hidden = bench.randn(*labels.shape, d).requires_grad_()
    weight = bench.randn(v, d, scale=2 / d**0.5).requires_grad_()
    ones = torch.ones(labels.numel(), device=bench.device)
    if name == "ours, VAR":
        rewards = torch.rand(sequences, device=bench.device)
        cut = torch.tensor([0, *(p + c for p, c in pairs)], device=bench.device).cumsum(0) if packed else None
        loss_of = VARLoss(lam=0.5, reference="none")

        def loss():
            return loss_of(hidden, weight, labels, rewards, cu_seqlens=cut)
    else:
        why = obstacle(name, bench.dry_run)
        if why:
            return [{**about, "note": f"not here: {why}"}]
        provider = PROVIDERS[name]

        def loss():
            return provider.loss(hidden.view(-1, d), weight, labels.view(-1), ones)

    def step():
        hidden.grad = weight.grad = None
        loss().backward()

    try:
        step()
        hidden.grad = weight.grad = None
        peak = bench.peak_mib(step)
        timing = bench.total({"": step})[""]
    except torch.cuda.OutOfMemoryError:
        return [{**about, "note": "out of memory"}]
    return [{**about, **timing, "peak_less_gradients_mib": peak - (hidden.nbytes + weight.nbytes) / MIB}]


def batch(dry_run: bool) -> list[Item]:
    """32 sequences as they come, padded and packed; prompts and padding are masked."""
    names = ("ours, one pass", "ours, any gradient", "ours, VAR", "plain", "liger, factor 16", "cce", "trl")
    return [
        Item(
            "batch",
            f"{name}, {'packed' if packed else 'padded'}",
            functools.partial(_batch, name=name, packed=packed),
            0.0 if dry_run else 2.5,
            name in PROVIDERS and PROVIDERS[name].other,
        )
        for packed in (False, True)
        for name in names
    ]


def _model(which: str, device):
    """Random weights in bf16 on the device; gradient checkpointing. 0.5B: Qwen2.5's shape; 8B: Llama 3's."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if which == "0.5B":
        sizes = (896, 4864, 24, 14, 2, 151936)
        build, config_class, extra = Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}
    elif which == "8B":
        sizes = (4096, 14336, 32, 32, 8, 128256)
        build, config_class, extra = LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}
    else:
        sizes = (32, 64, 2, 4, 2, 256)
        build, config_class, extra = LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}
    hidden, intermediate, layers, heads, kv_heads, v = sizes
    config = config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=v,
        max_position_embeddings=LONGEST * 4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = build(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class _Step:
    """Forward, backward and update on a batch of so many sequences; all positions have a label."""

    def __init__(self, which: str, device, length: int):
        self.model = _model(which, device)
        self.v = self.model.config.vocab_size
        self.device, self.length = device, length
        # 8B: plain SGD, without a state; AdamW's would be 32 GiB in bf16.
        if which == "8B":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, foreach=False)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def __call__(self, sequences: int, fused: bool) -> float:
        ids = torch.randint(0, self.v, (sequences, self.length), device=self.device)
        if fused:
            from var_kernels.integrations.hf import fused_lm_head

            with fused_lm_head(self.model):
                loss = self.model(input_ids=ids, labels=ids).loss
        else:
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def _synchronize(bench) -> None:
    if not bench.dry_run:
        torch.cuda.synchronize()


def _timed_steps(bench, step: _Step, sequences: int, fused: bool) -> dict:
    """tokens/s and peak of the median of three steps after one."""
    step(sequences, fused)
    if not bench.dry_run:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(3):
        _synchronize(bench)
        start = time.perf_counter()
        loss = step(sequences, fused)
        _synchronize(bench)
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[1]
    peak = None if bench.dry_run else torch.cuda.max_memory_allocated() / MIB
    return {
        "sequences": sequences,
        "ms": 1e3 * median,
        "tokens_per_s": sequences * step.length / median,
        "peak_mib": peak,
        "loss": loss,
    }


def _fits(step: _Step, sequences: int, fused: bool) -> bool:
    try:
        step(sequences, fused)
    except torch.cuda.OutOfMemoryError:
        step.optimizer.zero_grad(set_to_none=True)
    else:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return False


def largest_batch(fits, start: int, seconds: float) -> tuple[int, str]:
    """The most sequences that fit, and what bounds it: doubled from ``start``, which fits, then bisected, for so many
    seconds.
    """
    end = time.monotonic() + seconds
    good, bad = start, None
    while bad is None or bad - good > max(1, good // 8):
        if time.monotonic() > end:
            return good, f"at least: the search ended after {seconds:g} s"
        middle = 2 * good if bad is None else (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good, f"{bad} do not"


def _step(bench, which: str, fused: bool) -> list[dict]:
    sequences, length = (2, 16) if bench.dry_run else (2 if which == "8B" else 8, 2048)
    gpu_compare.problem.cache_clear()  # its memory is the model's
    about = {"model": which, "loss_kind": "fused" if fused else "plain", "length": length}
    trained = _Step(which, bench.device, length)
    measured = {"what": "step", **_timed_steps(bench, trained, sequences, fused)}
    rows = [{**about, **measured}]
    if bench.dry_run:
        limit, note = largest_batch(lambda n: n <= 5, sequences, 1.0)
    else:
        limit, note = largest_batch(lambda n: _fits(trained, n, fused), sequences, 20.0)
        torch.cuda.empty_cache()
    rows.append({**about, "what": "largest batch", **_timed_steps(bench, trained, limit, fused), "note": note})
    return rows


def step(dry_run: bool) -> list[Item]:
    """Plain against fused loss inside a whole step."""
    models = ("tiny",) if dry_run else ("0.5B", "8B")
    return [
        Item(
            "step",
            f"{which} {'fused' if fused else 'plain'}",
            functools.partial(_step, which=which, fused=fused),
            0.0 if dry_run else (60.0 if which == "8B" else 40.0),
        )
        for which in models
        for fused in (False, True)
    ]


SECTIONS = {"batch": batch, "step": step}
