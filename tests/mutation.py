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


def leave_a_tile_out(monkeypatch, module: ModuleType, which: str, adds: str = "add_factor_gradients") -> list[int]:
    """The second tile adds nothing to one gradient of a low-rank factor; the list grows with every tile. adds: the
    function that adds them.
    """
    original, calls = getattr(module, adds), []

    def leaves_one_out(head, gradients, *rest, **options):
        calls.append(1)
        before = getattr(gradients, which).clone()
        original(head, gradients, *rest, **options)
        if len(calls) == 2:
            getattr(gradients, which).copy_(before)

    monkeypatch.setattr(module, adds, leaves_one_out)
    return calls
