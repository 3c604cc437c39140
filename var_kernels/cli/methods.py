"""``var-kernels methods``: every training method, what it needs, and its options."""

import argparse
import inspect

from var_kernels.cli import nearest

# Columns of the data -> (what they are, the methods that need no more: how they make items of rows, and whether they
# need rewards).
DATA = {
    "prompt, completion": ("answers to imitate; of those with rewards the best", [("sft_items", "optional")]),
    "prompt, completion, reward": ("answers with a reward each", [("single_rows", "required")]),
    "prompt, completions, rewards": (
        "several answers to each prompt, with a reward each",
        [("var_items", "required"), ("whole_prompts", "required"), ("advantage_items", "required")],
    ),
    "prompt, chosen, rejected": ("pairs; of answers with rewards the best and the worst", [("pairs", "unless_pair")]),
    "prompt, chosen, rejected, chosen_reward, rejected_reward": ("pairs with rewards", [("pairs", "required")]),
    "prompt, completion, label": (
        "answers judged true or false; or pairs, or rewards",
        [("judged_rows", "unless_pair")],
    ),
}
_NEED = {"required": "needed", "optional": "not needed", "unless_pair": "needed unless the rows are pairs"}
_READS = {"": "not read", "sequence": "its log-prob of each answer", "token": "its log-prob of each token"}
_TEACHERS = {"": "", "given": "a teacher model", "reference": "the reference's distributions"}
# What the formulas are written in.
SYMBOLS = {
    "s": "log-prob of an answer, the sum over its tokens",
    "lp": "log-prob of a token",
    "p": "exp(lp)",
    "sr, lpr, lp_ref": "the same under the reference",
    "lp_old, s_old": "the same under the model that drew the answer",
    "len": "tokens of the answer",
    "_w, _l, +, -": "of the chosen (winner) and of the rejected (loser)",
    "D": "(s_w - sr_w) - (s_l - sr_l)",
    "r": "reward",
    "R": "sigmoid(r)",
    "q": "quantile of r among the rewards of the prompt's answers",
    "T, Z": "T(q) = q, and Z = E[exp(T(q) / beta)]",
    "V": "value of the prompt, learned",
    "A": "advantage: r above the mean, or as --advantages says",
    "A+": "max(R - V, 0)",
    "z0": "estimate of the KL to the reference in the batch",
    "mu": "what the reward head says at a token",
    "Q, KL, TD": "of AVA: help(var_kernels.losses.ava_d_loss)",
    "e": "label_smoothing, or clip_range",
    "k, lam, t": "options of the loss, one for each sign of A",
    "pi, pi_ref, pi_T": "distributions of a token: the policy's, the reference's and the teacher's",
    "K": "answers of the prompt",
    "H": "entropy of the policy at a token",
    "sg": "without a gradient",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one method: its formula, data, options and source")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/losses.md")


def run(args: argparse.Namespace) -> int:
    from var_kernels.integrations.trainer.methods import METHODS
    from var_kernels.losses import PASS_CLASSES, VARIANTS

    if args.markdown:
        print(markdown_table(), variants_table(), sep="\n\n")
        return 0
    if args.name is None:
        width = max(map(len, (*METHODS, *VARIANTS)))
        for columns, (rows, _) in DATA.items():
            print(f"{rows} ({columns}):")
            for name, method in METHODS.items():
                if columns_of(method) == columns:
                    print(f"  {name:<{width}}  {method.loss.formula}")
            print()
        print("variants, each a method with settings, or a function:")
        for name, variant in VARIANTS.items():
            print(f"  {name:<{width}}  {variant.use}")
        print("\nsymbols:")
        for symbol, meaning in SYMBOLS.items():
            print(f"  {symbol:<{width}}  {meaning}")
        print("\nAll about one, its options and their defaults too: var-kernels methods NAME")
        return 0
    if args.name in VARIANTS:
        variant = VARIANTS[args.name]
        print(f"{variant.name}: {variant.formula}")
        print(f"  use        {variant.use}")
        print(f"  source     {variant.source} (evidence: {variant.evidence})\n")
        function = variant.function or METHODS[variant.loss].loss.function
        print(inspect.getdoc(function))
        return 0
    if args.name not in METHODS:
        known = (*METHODS, *VARIANTS)
        raise ValueError(f"method must be one of {', '.join(known)}, got {args.name!r}{nearest(args.name, known)}")
    method = METHODS[args.name]
    loss = method.loss
    print(f"{loss.name}: {loss.formula}")
    columns = columns_of(method)
    print(f"  data       {columns}: {DATA[columns][0]}")
    print(f"  gradient   class {loss.pass_class}: {PASS_CLASSES[loss.pass_class]}")
    print(f"  an item    {loss.item}; rewards {_NEED[method.need_rewards]}")
    print(f"  reference  {_reads(method)}")
    if method.head:
        print(f"  head       {method.head}, beside the lm_head")
    for name, (kind, default, meaning) in method.own_settings.items():
        shown = getattr(kind, "__name__", str(kind))
        print(f"  --{name.replace('_', '-')} {shown.upper()}  {meaning} (default {default})")
    print()
    print(inspect.getdoc(loss.function))
    return 0


def _reads(method) -> str:
    """The part of the reference that is read, by default and with the setting that reads more."""
    if method.teacher == "reference":
        return f"{_TEACHERS['reference']} over the vocabulary; it stays in memory"
    reads = _READS[method.reference]
    _, default, _ = method.own_settings.get("reference", (str, "", ""))
    return f"not read; with --reference mean or sum {reads}" if default == "none" else reads


def columns_of(method) -> str:
    """The fewest columns that the method needs: a key of ``DATA``."""
    kind = method.items.__name__, method.need_rewards
    return next(columns for columns, (_, kinds) in DATA.items() if kind in kinds)


def markdown_table() -> str:
    """A row for each method: made from the registry, so that it says what runs."""
    from var_kernels.integrations.trainer.methods import METHODS

    lines = ["| name | loss of an item | class | item | reads | options | source, evidence |", "|---" * 7 + "|"]
    for name, method in METHODS.items():
        loss = method.loss
        options = ", ".join(f"`{option}` {default}" for option, (_, default, _) in method.own_settings.items())
        reads = _TEACHERS[method.teacher] or ", ".join(f"`{read}`" for read in loss.inputs)
        formula = loss.formula.replace("|", "\\|")
        source = f"{loss.source} ({loss.evidence})"
        cells = (f"`{name}`", formula, loss.pass_class, loss.item, reads, options, source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_table() -> str:
    from var_kernels.losses import VARIANTS

    lines = ["| variant | what it is | class | use | source, evidence |", "|---" * 5 + "|"]
    for name, variant in VARIANTS.items():
        formula = variant.formula.replace("|", "\\|")
        source = f"{variant.source} ({variant.evidence})"
        cells = (f"`{name}`", formula, variant.pass_class, f"`{variant.use}`", source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
