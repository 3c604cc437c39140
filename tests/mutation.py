"""Mistakes to be refused: in a kernel's text, or in the sum over tiles."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant_of(module: ModuleType, before: str, after: str, folder: Path) -> ModuleType:
    """``module`` with every ``before`` in its source replaced, as another module, which the interpreter runs too."""
    source = Path(module.__file__).read_text()
    assert before in source, f"{module.__name__} has no {before!r} any more"
    path = folder / "mutant.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


# The gradient of a low-rank factor, the function that adds to it, and the argument's place there.
_SUMS = {"dleft_NR": ("row_products", 4), "dright_VR": ("token_products", 5)}


def leave_a_tile_out(monkeypatch, which: str, *modules: ModuleType) -> list[int]:
    """The second tile adds nothing to the gradient of a low-rank factor; the list grows with every tile."""
    name, at = _SUMS[which]
    original, calls = getattr(modules[0], name), []

    def leaves_one_out(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            arguments = [*arguments[:at], None, *arguments[at + 1 :]]
        original(*arguments, **options)

    for module in modules:
        monkeypatch.setattr(module, name, leaves_one_out)
    return calls
