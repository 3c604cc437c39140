"""A kernel file with one mistake in it, as a module of its own; under the interpreter it runs like the real one."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant_of(module: ModuleType, before: str, after: str, folder: Path) -> ModuleType:
    """``module`` with every ``before`` in its source replaced."""
    source = Path(module.__file__).read_text()
    assert before in source, f"{module.__name__} has no {before!r} any more"
    path = folder / "mutant.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
