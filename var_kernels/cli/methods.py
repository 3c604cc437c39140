"""``var-kernels methods``: every training method, what it needs, and its options."""

import argparse
import inspect

from var_kernels.cli import nearest


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
        for name, method in METHODS.items():
            print(f"{name:<{width}}  {method.loss.formula}")
        print("\nvariants, each a method with settings, or a function:")
        for name, variant in VARIANTS.items():
            print(f"{name:<{width}}  {variant.use}")
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
        raise ValueError(f"unknown method {args.name!r}{nearest(args.name, known)}; methods: {', '.join(known)}")
    method = METHODS[args.name]
    loss = method.loss
    print(f"{loss.name}: {loss.formula}")
    print(f"  gradient   class {loss.pass_class}: {PASS_CLASSES[loss.pass_class]}")
    print(f"  an item    {loss.item}; rewards {method.need_rewards.replace('_', ' ')}")
    print(f"  reference  {method.reference or 'none'}")
    if method.head:
        print(f"  head       {method.head}, beside the lm_head")
    print(f"  source     {loss.source} (evidence: {loss.evidence})")
    for name, (kind, default, meaning) in method.own_settings.items():
        shown = getattr(kind, "__name__", str(kind))
        print(f"  --{name.replace('_', '-')} {shown.upper()}  {meaning} (default {default})")
    print()
    print(inspect.getdoc(loss.function))
    return 0


def markdown_table() -> str:
    """A row for each method: made from the registry, so that it says what runs."""
    from var_kernels.integrations.trainer.methods import METHODS

    lines = ["| name | loss of an item | class | item | reads | options | source | evidence |", "|---" * 8 + "|"]
    for name, method in METHODS.items():
        loss = method.loss
        options = ", ".join(f"`{option}` {default}" for option, (_, default, _) in method.own_settings.items())
        reads = ", ".join(f"`{read}`" for read in loss.inputs)
        formula = loss.formula.replace("|", "\\|")
        cells = (f"`{name}`", formula, loss.pass_class, loss.item, reads, options, loss.source, loss.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_table() -> str:
    from var_kernels.losses import VARIANTS

    lines = ["| variant | what it is | class | use | source | evidence |", "|---" * 6 + "|"]
    for name, variant in VARIANTS.items():
        formula = variant.formula.replace("|", "\\|")
        cells = (f"`{name}`", formula, variant.pass_class, f"`{variant.use}`", variant.source, variant.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
