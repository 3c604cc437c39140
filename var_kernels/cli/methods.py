"""``var-kernels methods``: every training method, what it needs, and its options."""

import argparse
import inspect

from var_kernels.cli import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one method: its formula, data, options and source")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/losses.md")


def run(args: argparse.Namespace) -> int:
    from var_kernels.integrations.trainer.methods import METHODS
    from var_kernels.losses import PASS_CLASSES

    if args.markdown:
        print(markdown_table())
        return 0
    if args.name is None:
        width = max(map(len, METHODS))
        for name, method in METHODS.items():
            print(f"{name:<{width}}  {method.loss.formula}")
        return 0
    if args.name not in METHODS:
        raise ValueError(f"unknown method {args.name!r}{nearest(args.name, METHODS)}; methods: {', '.join(METHODS)}")
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
