"""The losses by name: what each one reads, what an item of its batch is, and which passes over the head it may take.

A loss of this library is its formula alone: what its tensors are follows from their names, so they are checked, widened
and described here.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from var_kernels.losses.checks import check_beside, read_rows, read_tokens

Function = TypeVar("Function", bound=Callable[..., Any])

PASS_CLASSES = {
    "A": "the gradient per token is known before the forward pass: one pass",
    "B": "it depends on that token's own log-prob and entropy: one pass",
    "C": "it depends on the sequence, its pair or its prompt's other completions: two passes",
    "D": "it depends on the whole global batch: two passes with a collective between them",
}
"""Class of a loss -> what its gradient per token depends on, and the passes over the head that follow."""
ITEMS = ("sequence", "pair", "group", "token")
LOSSES: dict[str, "Loss"] = {}
"""Name -> ``Loss``, of every loss that ``register`` has seen."""
MODEL_LOSSES: dict[str, "Loss"] = {}
"""Losses of a reward head, or of two models' heads: methods of the trainer, which ``linear_loss`` cannot compute."""


@dataclass(frozen=True)
class Loss:
    """A loss and what is to be known about it: see ``register``.

    The function's signature is the declaration: positional parameters are tensors by their canonical names, the
    policy's log-probs first; keyword-only parameters are the method's options. It returns one loss an item.

        item        policy's log-probs                                  and, as they are needed
        sequence    policy_logp (B,)                                    ref_logp, reward, value, lengths (B,)
        group       policy_logp (B,) with group_ids (B,)                the same; rows of a prompt share an id
        pair        policy_chosen_logp, policy_rejected_logp (P,)       ref_chosen_logp, chosen_reward, chosen_lengths
        token       token_logp (...)                                    old_token_logp, ref_token_logp, advantage (...)

    From the signature: tensors: names of the tensors, in the function's order; single_names: ``single_name`` of each;
    optional_tensors: those with a default. inputs: what a caller must give of each row, the required tensors but the
    policy's own and those that labels give, a pair's two under one name. reads_policy: log-probs of the lm_head are
    among the tensors; reads_tokens: they come per token and not as sums of sequences. options: defaults,
    ``inspect.Parameter.empty`` where there is none; option_types: annotations, else the defaults' types, or float.
    """

    name: str
    function: Callable[..., Tensor]
    pass_class: str
    item: str
    formula: str
    source: str
    evidence: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    compares: str = ""
    reads_draws: bool = False
    policy_labels: bool = False
    tensors: tuple[str, ...] = field(init=False, repr=False, compare=False)
    single_names: dict[str, tuple[str, int | None]] = field(init=False, repr=False, compare=False)
    optional_tensors: frozenset[str] = field(init=False, repr=False, compare=False)
    inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    reads_policy: bool = field(init=False, repr=False, compare=False)
    reads_tokens: bool = field(init=False, repr=False, compare=False)
    options: dict[str, object] = field(init=False, repr=False, compare=False)
    option_types: dict[str, object] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Parses the signature, once."""
        parameters = inspect.signature(self.function).parameters.values()
        rows, options = ([p for p in parameters if p.kind is kind] for kind in _PARAMETER_KINDS)
        single = {p.name: single_name(p.name) for p in rows}
        inputs = dict.fromkeys(single[p.name][0] for p in rows if p.default is p.empty)
        types = {p.name: float if p.default is p.empty else type(p.default) for p in options}
        parsed = {
            "tensors": tuple(single),
            "single_names": single,
            "optional_tensors": frozenset(p.name for p in rows if p.default is not p.empty),
            "inputs": tuple(name for name in inputs if name not in _KNOWN),
            "reads_policy": any(name in ("policy_logp", "token_logp") for name, _ in single.values()),
            "reads_tokens": any(name == "token_logp" for name, _ in single.values()),
            "options": {p.name: p.default for p in options},
            "option_types": types | {p.name: p.annotation for p in options if p.annotation is not p.empty},
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)

    def no_rows(self) -> dict[str, Tensor]:
        """Arguments of an empty batch, on which the function only checks its options."""
        empty = {}
        for name, (single, _) in self.single_names.items():
            kind = _KINDS.get(single, torch.float32)
            if name != "kl_baseline":
                empty[name] = torch.zeros((0, 1) if self.reads_tokens and self.pass_class == "C" else 0, dtype=kind)
        return empty

    def options_of(self, settings: object) -> dict[str, object]:
        """The attributes of ``settings`` that are options of the loss."""
        return {name: getattr(settings, name) for name in self.options}

    def check_options(self, given: Mapping[str, object]) -> None:
        """Raises ValueError for options that the loss does not have, and for missing ones."""
        if unknown := sorted(set(given) - set(self.options)):
            known = ", ".join(self.options) or "none"
            raise ValueError(
                f"options of {self.name!r} must be among {known}, got {', '.join(map(repr, unknown))}; leave out others"
            )
        missing = [k for k, default in self.options.items() if default is inspect.Parameter.empty and k not in given]
        if missing:
            raise ValueError(
                f"{self.name!r} needs {', '.join(f'{name}=' for name in missing)}, got none; pass it, since it has no "
                "default"
            )


_PARAMETER_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# What is no floating-point number.
_INTEGERS, _FLAGS = ("lengths", "group_ids"), ("desirable", "mask", "counted")
_KINDS = dict.fromkeys(_INTEGERS, torch.int64) | dict.fromkeys(_FLAGS, torch.bool)
MEANINGS = {
    "policy_logp": "summed log-probs under the policy, nats; differentiated",
    "ref_logp": "the same under the frozen reference; constants",
    "old_logp": "the same under the policy that drew the completions; constants",
    "token_logp": "log-probs of the labels under the policy, nats; differentiated",
    "ref_token_logp": "the same under the frozen reference; constants",
    "old_token_logp": "the same under the policy that drew the tokens; constants",
    "entropy": "the policy's entropy at each token, nats; constants",
    "reward": "reward units; constants",
    "value": "V(x), the expected reward of the row's prompt, reward units; constants",
    "advantage": "of any sign; constants",
    "sample_weight": ">= 0; constants",
    "lengths": "integers, the tokens that carry loss",
    "group_ids": "integers, equal for the completions of a prompt",
}
"""Single name of a tensor -> what it holds in every loss of this library."""
# Of every loss here, by its item: shape of a tensor, and what is returned.
_RETURNS = {
    "sequence": ("(B,)", "(B,) a loss of each sequence; the caller reduces."),
    "group": ("(B,)", "(B,) the rows' terms; sum them, and divide by the number of groups."),
    "pair": ("(P,)", "(P,) a loss of each pair; the caller reduces."),
    "token": ("(...)", "The shape of token_logp: a loss of each token."),
}
_UNIT = "fp32 (fp64 for fp64 inputs), in nats unless the formula names another unit."
_RAISES = """

Raises:
    TypeError, ValueError: options out of range, shapes and dtypes; on the CPU also constants that are not finite."""
# From the head and the labels themselves.
_KNOWN = frozenset(["policy_logp", "token_logp", "entropy", "lengths", "mask"])


def single_name(name: str) -> tuple[str, int | None]:
    """(its name for a single sequence, 0 chosen or 1 rejected): "ref_chosen_logp" -> ("ref_logp", 0)."""
    words = name.split("_")
    for row, part in enumerate(("chosen", "rejected")):
        if part in words:
            words.remove(part)
            return "_".join(words), row
    return name, None


def _item_of(names: Collection[str]) -> str:
    """The item of a loss of tensors with these names."""
    if any(single_name(name)[1] is not None for name in names):
        return "pair"
    return "group" if "group_ids" in names else "token" if "token_logp" in names else "sequence"


def _reading(function: Function, item: str) -> Function:
    """The function, its positional tensors checked by their names before it runs: one shape and device, ids and flags
    of their dtypes. Those in floating point come in fp32 at least, constants (all but the policy's) detached and, but
    for those of tokens, finite. Lengths are left to ``per_token``, since an option may leave them out.
    """
    rows = [p for p in inspect.signature(function).parameters.values() if p.kind is _PARAMETER_KINDS[0]]
    names, required = [p.name for p in rows], {p.name for p in rows if p.default is p.empty}
    kinds = {name: _KINDS.get(single_name(name)[0], torch.float32) for name in names if "lengths" not in name}
    floating = [name for name, kind in kinds.items() if kind == torch.float32 and name != "kl_baseline"]
    others = {n: "bool" if k == torch.bool else "integer" for n, k in kinds.items() if k != torch.float32}
    learning = [name for name in names if name.startswith("policy_") or name.endswith("_mu")]
    row = "pair" if item == "pair" else "sequence"

    @functools.wraps(function)
    def reading(*values: Any, **named: Any) -> Any:
        given = {**dict(zip(names, values, strict=False)), **named}
        there = [name for name in names if name in given and (name in required or given[name] is not None)]
        tensors = {name: given[name] for name in floating if name in there}
        if tensors:
            read = read_tokens(**tensors) if item == "token" else read_rows(row, learning, **tensors)
            for name, kind in others.items():
                if name in there:
                    check_beside(next(iter(tensors)), read[0], kind, **{name: given[name]})
            given.update(zip(tensors, read, strict=True))
        in_order = [given[name] for name, _ in zip(names, values, strict=False)]
        return function(*in_order, *values[len(names) :], **{name: given[name] for name in named})

    return cast(Function, reading)


def _described(loss: Loss) -> str:
    """The docstring of a loss with its tensors, its result and its errors, where it says nothing of its own on them."""
    body, _, args = (inspect.getdoc(loss.function) or "").partition("\n\nArgs:\n")
    args, _, returns = args.partition("\n\nReturns:\n")
    own = {name for line in re.findall(r"^    ([\w, ]+):", args, re.MULTILINE) for name in line.split(", ")}
    shape, result = _RETURNS[loss.item]
    by_meaning: dict[str, list[str]] = {}
    for name, (single, _) in loss.single_names.items():
        if name not in own and single in MEANINGS and "chosen_*" not in args:
            by_meaning.setdefault(MEANINGS[single], []).append(name)
    lines = [f"    {', '.join(names)}: {shape} {meaning}." for meaning, names in by_meaning.items()]
    args = "\n".join([*lines, *([args] if args else [])])
    return f"{body}\n\nArgs:\n{args}\n\nReturns:\n{returns or f'    {result} {_UNIT}'}{_RAISES}"


def find_loss(name: str) -> Loss:
    """The registry's entry. Raises ValueError for an unknown name, with the known ones."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(sorted(LOSSES))}, got {name!r}")
    return LOSSES[name]


def register(
    name: str,
    *,
    pass_class: str,
    formula: str,
    item: str | None = None,
    source: str = "",
    evidence: str = "unverified",
    defaults: Mapping[str, object] | None = None,
    compares: str | None = None,
    reads_draws: bool = False,
    policy_labels: bool = False,
    of_log_probs: bool = True,
) -> Callable[[Function], Function]:
    """Decorator: enter the function into ``LOSSES`` under ``name``, for ``linear_loss`` and, by ``method_config``, for
    ``VARTrainer``; the function itself is returned as it is, its docstring with the source. Its signature is the
    declaration, see ``Loss``.

    Args:
        pass_class: a key of ``PASS_CLASSES``: what its gradient in a token's log-prob depends on. The weaker, the fewer
            passes over the head; one that promises too much trains on wrong gradients.
        item: "sequence", "pair", "group" or "token". None: as the names of the tensors have it, a pair where one is
            chosen, a group with group_ids, a token with token_logp.
        formula, source: for the table. evidence: where the formula was read: "paper", "summary" (of the paper), "code"
            (the authors'), "third-party code", "derived" or "unverified".
        defaults: what the trainer sets for options that have no default in the signature.
        compares: what a reward is compared with, the completions of its "prompt", of the "step", of the "data", or ""
            nothing: the trainer refuses rewards that are equal there. None: "prompt" for a group, else "".
        reads_draws: completions count as draws of the policy, or of the reference: online, log-probs are read at the
            temperature of the draws.
        policy_labels: chosen and rejected change places as the policy itself would label them.
        of_log_probs: False enters it into ``MODEL_LOSSES``.

    Raises:
        ValueError: a name that is taken, a class or an item that does not exist, defaults of no option.
    """
    table = LOSSES if of_log_probs else MODEL_LOSSES
    entered = LOSSES.get(name) or MODEL_LOSSES.get(name)
    if entered or pass_class not in PASS_CLASSES or item not in (None, *ITEMS):
        taken = f"; {name!r} is {entered.function.__qualname__} already" if entered else ""
        raise ValueError(
            f"loss {name!r} must have a new name, a pass_class of {', '.join(PASS_CLASSES)} and an item of "
            f"{', '.join(ITEMS)}, got pass_class={pass_class!r}, item={item!r}{taken}"
        )

    def enter(function: Function) -> Function:
        names = inspect.signature(function).parameters
        kind, own = item or _item_of(names), str(function.__module__).startswith("var_kernels.")
        if own and not {"mask", "chosen_mask"} & names.keys():  # AVA's rows are of tokens
            function = _reading(function, kind)
        compared = compares if compares is not None else "prompt" if kind == "group" else ""
        facts = (dict(defaults or {}), compared, reads_draws, policy_labels)
        loss = Loss(name, function, pass_class, kind, formula, source, evidence, *facts)
        if unknown := sorted(set(loss.defaults) - set(loss.options)):
            raise ValueError(f"defaults must name options of the loss {name!r}, got {', '.join(unknown)}")
        table[name] = loss
        if source and function.__doc__:
            doc = _described(loss) if own else inspect.getdoc(function)
            function.__doc__ = f"{doc}\n\nSource: {source} (evidence: {evidence})."
        return function

    return enter
