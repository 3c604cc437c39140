"""A report of what training would do, made without a step and without a file: ``var-kernels train --dry-run``."""

import copy
import itertools
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from operator import itemgetter

import torch
from torch import Tensor

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.data import EncodedRows, end_tokens
from var_kernels.integrations.hf import token_logprobs
from var_kernels.integrations.hf.forwards import evaluating
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trainer.checks import check_arguments, check_online, check_positions, check_vocabulary
from var_kernels.integrations.trainer.collator import Items, equal_pair, model_inputs, parsed_examples, read_items
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.integrations.trainer.online import OnlineLoop
from var_kernels.integrations.trainer.reward_effect import check_rewards
from var_kernels.integrations.trainer.sharding import calibrate_first_rank, parameter_counts
from var_kernels.ops.head import budget_bytes

MIB = 2**20
_SHOWN_TOKENS = 48  # of a run of tokens with or without labels
_LAM_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_STEPS = 50  # that effective sample sizes are averaged over
_SCORED_TOKENS = 8192  # that the reference scores for them
# Of an optimizer, in units of the parameters' size.
_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


def preview(
    model,
    config,
    rows: Sequence,
    tokenizer,
    *,
    reward_func=None,
    sampler=None,
    peft_config=None,
    malformed: int = 0,
    shown: int = 3,
) -> str:
    """A report of what ``VARTrainer(model, config, rows, processing_class=tokenizer, ...)`` would train on.

    The rows as tokens, what was cut and left out, prompts and completions, the spread of rewards, the effective sample
    size of VAR's weights over several lam, steps, parameters and an estimate of the peak memory. If the reference's
    log-probs are part of the weights, the model scores up to 8192 tokens. With ``peft_config`` the model is wrapped, as
    by training.

    Args:
        malformed: rows that were left out before. shown: rows that are shown as tokens.

    Raises:
        DataError, ValueError: rows or settings that training would refuse, too; rewards without effect are part of the
            report.
    """
    check_arguments(config, rows, None, peft_config)
    method = METHODS[config.method]
    check_vocabulary(model, tokenizer)
    calibrate_first_rank(model, config.device, config.process_index)
    if config.online:
        check_online(config, reward_func, sampler, None)
        prompts = parsed_examples(rows, "train_dataset", "prompt")
        loop = OnlineLoop(config, prompts, None, tokenizer, None, reward_func)
        loop.check_model(model)
        sections = [_prompt_lines(loop, tokenizer, config, shown)]
        longest = max(len(prompt.ids) for prompt in loop.prompts) + config.max_new_tokens
        steps = (loop.steps, config.iterations)
        batch = (loop.rows_an_item * config.per_device_train_batch_size, longest)
        live_reference = loop.reads_initial_model
    else:
        ends = end_tokens(tokenizer, inner_model(model))
        items = read_items(rows, "train_dataset", config, method, tokenizer, reward_func, ends, None)
        sections = [_row_lines(items, tokenizer, shown), _data_lines(items, config, ends, malformed)]
        stops = _stop_lines(model, items, config, method)
        sections += [_reward_lines(items), *([stops] if stops else [])]
        if config.method == "var" and (config.reference == "none" or not stops):
            sections.append(_sample_size_lines(model, items, config))
        steps = (math.ceil(len(items) / config.items_per_step), config.num_train_epochs)
        batch = _largest_batch(items, config)
        live_reference = bool(method.reference) and not config.precompute_ref_log_probs
        live_reference |= method.teacher == "reference"
    sections.append(_step_lines(steps, config, "iteration" if config.online else "epoch"))
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    sections.append(_memory_lines(model, config, batch, live_reference and peft_config is None))
    title = f"dry run of method {config.method!r}: nothing is trained or written"
    return "\n\n".join([title, *("\n".join(lines) for lines in sections)])


# ---- rows as tokens --------------------------------------------------------------------------------------------------


def token_line(tokenizer, ids: list[int]) -> str:
    """Each token as the text that it stands for, special ones by name, with a bar between two; a long run without its
    middle."""
    half = _SHOWN_TOKENS // 2
    cut = len(ids) - 2 * half
    texts = [
        tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for i in (ids if cut <= 0 else ids[:half] + ids[-half:])
    ]
    texts = [text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") for text in texts]
    return "|".join(texts) if cut <= 0 else f"{'|'.join(texts[:half])} ... {cut} more ... {'|'.join(texts[half:])}"


def _row_lines(items: Items, tokenizer, shown: int) -> list[str]:
    table = items.rows
    lines = [f"the first rows, token by token ({min(shown, len(table))} of {len(table):,})"]
    for row in range(min(shown, len(table))):
        known = table.row(row)
        ids, kept = known["input_ids"].tolist(), (known["labels"] != IGNORE_INDEX).tolist()
        reward = f", reward {table.reward[row].item():g}" if table.reward is not None else ""
        group = table.groups[int(table.group[row])]
        place = f", completion {group.index(row) + 1} of {len(group)}" if len(group) > 1 else ""
        lines.append(f"  {table.where[row]}{place}: {len(ids)} tokens, {sum(kept)} of them trained{reward}")
        for trained, run in itertools.groupby(zip(ids, kept, strict=True), itemgetter(1)):
            name = "trained" if trained else "not trained"
            lines.append(f"    {name:<12}{token_line(tokenizer, [token for token, _ in run])}")
    return lines


def _prompt_lines(loop: OnlineLoop, tokenizer, config, shown: int) -> list[str]:
    lines = [f"the first prompts, token by token ({min(shown, len(loop.prompts))} of {len(loop.prompts):,})"]
    for prompt in loop.prompts[:shown]:
        lines += [f"  {prompt.where}: {len(prompt.ids)} tokens", f"    not trained {token_line(tokenizer, prompt.ids)}"]
    sizes = [len(prompt.ids) for prompt in loop.prompts]
    room = config.max_length - config.max_new_tokens
    drawn = f"{config.generations_per_prompt} completions of {config.prompts_per_iteration} prompts an iteration"
    return [
        *lines,
        "",
        "data",
        f"  prompts       {len(sizes):,}, {_range(sizes)} tokens, of at most {room}",
        f"  draws         {drawn}, at most {config.max_new_tokens} tokens each",
    ]


# ---- counts ----------------------------------------------------------------------------------------------------------


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {statistics.median_low(values):,})"


def _data_lines(items: Items, config, ends: tuple[int, ...], malformed: int) -> list[str]:
    table = items.rows
    prompt = table.prompt_length.tolist()
    completion = [table.length(row) - size for row, size in enumerate(prompt)]
    trained = {row for item in items.items for row in item}
    sizes = {len(item) for item in items.items}
    kind = "completions" if sizes == {1} else "pairs" if sizes == {2} else "prompts with their completions"
    open_ended = sum(not set(ends) & set(table.completion_ids(row)) for row in range(len(table)))
    equal = sum(equal_pair(table, table.groups[i], config) for i, is_pair in enumerate(table.is_pair) if is_pair)
    return [
        "data",
        f"  prompts       {len(table.groups):,}, {_range(prompt)} tokens",
        f"  completions   {len(table):,}, {_range([len(group) for group in table.groups])} a prompt, "
        f"{_range(completion)} tokens",
        f"  items         {len(items):,} {kind}; {len(table) - len(trained):,} completions are in none",
        f"  cut           {table.cut_prompts:,} completions lost the beginning of their prompt, "
        f"{table.cut_completions:,} their own end (max_length {config.max_length})",
        f"  no end token  {open_ended:,} completions",
        f"  equal pairs   {equal:,} hold the same tokens twice",
        f"  malformed     {malformed:,} rows were left out",
    ]


def _reward_lines(items: Items) -> list[str]:
    reward, groups = items.rows.reward, items.rows.groups
    if reward is None:
        return ["rewards", "  none: pairs are ordered, or the method reads none"]
    lines = ["rewards"]
    if missing := int(reward.isnan().sum()):
        lines.append(f"  missing       {missing:,} of {len(reward):,}")
    known = reward[~reward.isnan()].double()
    if len(known):
        low, high = known.min().item(), known.max().item()
        spread = known.std(correction=0).item()
        lines.append(f"  over all      mean {known.mean():.4g}, std {spread:.4g}, {low:.4g} to {high:.4g}")
    several = [reward[group].double() for group in groups if len(group) > 1]
    inside = [values.std(correction=0).item() for values in several if not values.isnan().any()]
    if inside:
        tied = sum(value == 0 for value in inside)
        lines.append(
            f"  in a prompt   std {statistics.fmean(inside):.4g} on average over {len(inside):,} prompts of several "
            f"completions; {tied:,} have equal rewards"
        )
    lines.append(f"  alone         {sum(len(group) == 1 for group in groups):,} prompts have one completion")
    return lines


def _stop_lines(model, items: Items, config, method) -> list[str]:
    """Refusals by training of rows that can be read."""

    def refusal(check, *arguments) -> list[str]:
        try:
            check(*arguments)
        except ValueError as error:
            return [f"training would stop: {error}"]
        return []

    rows = items.rows
    return refusal(check_positions, model, rows) + refusal(check_rewards, rows, config, method, "train_dataset")


# ---- VAR's weights ---------------------------------------------------------------------------------------------------


def _sample_size_lines(model, items: Items, config) -> list[str]:
    """ESS over the size of a step, for the steps that training would begin with (in another order)."""
    table, size = items.rows, config.items_per_step
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(config.seed)).tolist()
    steps = [
        [row for place in order[at : at + size] for row in items.items[place]] for at in range(0, len(order), size)
    ]
    steps = steps[: min(_STEPS, max(1, len(order) // size))]
    ref_logp = None
    if config.reference != "none":
        steps = _within_budget(table, steps)
        ref_logp = _score(model, table, [row for step in steps for row in step], config)
    lines = [
        "effective sample size of VAR's weights, as a share of a step's completions",
        f"  normalizer {config.normalizer!r}, reference {config.reference!r}; mean over {len(steps):,} steps of "
        f"{_range([len(step) for step in steps])} completions",
    ]
    found = []
    for factor in _LAM_FACTORS:
        lam = config.lam * factor
        share = statistics.fmean(_share(table, step, ref_logp, config, lam) for step in steps)
        found.append(f"lam {lam:g}: {share:.0%}" + (" (the setting)" if factor == 1 else ""))
    return [*lines, "  " + "   ".join(found)]


def _share(table: EncodedRows, step: list[int], ref_logp: Tensor | None, config, lam: float) -> float:
    rows = [table.row(row) for row in step]
    known = {"reward": table.reward[step], "group": torch.stack([row["group"] for row in rows])}
    known["length"] = torch.stack([row["labels"][1:].ne(IGNORE_INDEX).sum() for row in rows])
    if ref_logp is not None:
        known["ref_logp"] = ref_logp[step]
    other = copy.copy(config)
    other.lam = lam
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights that have collapsed: that is what is shown
        return METHODS["var"].prepare(known, other, None)[1]["ess_share"].item()


def _within_budget(table: EncodedRows, steps: list[list[int]]) -> list[list[int]]:
    """The first steps of at most 8192 tokens; of a first one that is larger, its first rows."""

    def fitting(sizes: Iterable[int]) -> int:
        return sum(total <= _SCORED_TOKENS for total in itertools.accumulate(sizes))

    if kept := fitting(sum(map(table.length, step)) for step in steps):
        return steps[:kept]
    return [steps[0][: max(1, fitting(map(table.length, steps[0])))]]


@torch.no_grad()
def _score(model, table: EncodedRows, rows: list[int], config) -> Tensor:
    """(all rows,) log-probs of these rows' completions under the model, 0 elsewhere."""
    result = torch.zeros(len(table))
    device, size = next(model.parameters()).device, config.per_device_eval_batch_size
    with evaluating(model):
        for at in range(0, len(rows), size):
            members = rows[at : at + size]
            inputs = model_inputs(table, members, 0, device)
            result[members] = token_logprobs(model, inputs, workspace_mb=config.workspace_mb).float().sum(1).cpu()
    return result


# ---- steps and memory ------------------------------------------------------------------------------------------------


def _step_lines(steps: tuple[int, float], config, unit: str) -> list[str]:
    count, rounds = steps
    whole = config.max_steps if config.max_steps > 0 else math.ceil(count * rounds)
    micro = config.per_device_train_batch_size
    factors = f"{micro} x {config.gradient_accumulation_steps} accumulated x {config.world_size} ranks"
    return ["steps", f"  {count:,} an {unit}, {whole:,} in all; {factors} items a step"]


def _largest_batch(items: Items, config) -> tuple[int, int]:
    """(rows, tokens of each) of the largest micro-batch that the items can make."""
    table = items.rows
    longest = sorted(items.items, key=lambda item: max(map(table.length, item)), reverse=True)
    rows = [row for item in longest[: config.per_device_train_batch_size] for row in item]
    return len(rows), max(map(table.length, rows))


def _memory_lines(model, config, batch: tuple[int, int], live_reference: bool) -> list[str]:
    parameters = list(model.parameters())
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    weights, gradients = _bytes(parameters), _bytes(learned)
    name = str(getattr(config.optim, "value", config.optim))
    states = 0.25 * 2 if "8bit" in name else next((n for kind, n in _STATES.items() if name.startswith(kind)), 2)
    head = inner_model(model).get_output_embeddings().weight
    loss = min(budget_bytes(config.workspace_mb, head), 4 * batch[0] * batch[1] * head.shape[0])
    parts = {
        "weights": weights,
        "gradients": gradients,
        f"optimizer ({name})": states * gradients,
        "reference, a copy of the weights": weights * live_reference,
        "fused loss": loss,
        f"activations of {batch[0]} x {batch[1]:,} tokens": _activations(model, config, batch),
    }
    known = [size for size in parts.values() if size is not None]
    lines = ["memory, an estimate", "  parameters {:,}, of which {:,} are trained".format(*parameter_counts(model))]
    for part, size in parts.items():
        if size != 0:
            lines.append(f"  {part:<40}" + ("unknown" if size is None else f"{size / MIB:>10,.1f} MiB"))
    rest = "" if len(known) == len(parts) else " without activations"
    title = f"peak of a rank{rest}, at least"
    return [*lines, f"  {title:<40}{sum(known) / MIB:>10,.1f} MiB, and what Python and torch take"]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(model, config, batch: tuple[int, int]) -> int | None:
    """Bytes that the layers below the head save for the backward pass of a micro-batch; with checkpointing what is kept
    of each layer, and one layer's own. None for a model that cannot be run on stand-ins."""
    body = getattr(inner_model(model), "base_model", None)
    if body is None:
        return None
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(storage)  # its number is not given to another
        return tensor

    from torch._subclasses import FakeTensorMode

    alive: list = []
    try:
        with FakeTensorMode() as mode:
            names = [*body.named_parameters(remove_duplicate=False), *body.named_buffers(remove_duplicate=False)]
            twins: dict[int, Tensor] = {id(tensor): mode.from_tensor(tensor) for _, tensor in names}
            state = {name: twins[id(tensor)] for name, tensor in names}
            own = {tensor.untyped_storage()._cdata for tensor in state.values()}
            device = next(body.parameters()).device
            ids = torch.zeros(batch, dtype=torch.int64, device=device)
            half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
            autocast = torch.autocast(device.type, half) if half else nullcontext()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                torch.func.functional_call(body, state, kwargs={"input_ids": ids, "use_cache": False})
    except Exception:  # control flow that reads values, kernels without a fake form
        return None
    total, layers = sum(saved.values()), getattr(inner_model(model).config.get_text_config(), "num_hidden_layers", 1)
    if config.gradient_checkpointing or getattr(config, "activation_checkpointing", False):
        width = inner_model(model).config.get_text_config().hidden_size
        size = 2 if half else next(body.parameters()).element_size()
        return total // layers + layers * batch[0] * batch[1] * width * size
    return total
