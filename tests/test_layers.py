"""The layers go one way, and importing the package stays light."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import var_kernels

ROOT = Path(var_kernels.__file__).parent
# Each layer may import from itself and from those before it.
ORDER = ["kernels", "ops", "losses", "integrations", "cli"]
HEAVY = {"transformers", "datasets", "accelerate", "peft", "trl", "tokenizers"}


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.with_suffix("").relative_to(ROOT.parent).parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path):
    """The module of every import in a file, those inside functions too; relative ones resolved."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first if first in ORDER else "top"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_layers_before(path):
    layer = layer_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "var_kernels" or len(parts) < 2:
            continue
        target = parts[1]
        if layer == "top":
            continue
        if target == "reference":
            pytest.fail(f"{path.name} imports the reference twins, which are for tests and benchmarks")
        if target in ORDER:
            assert ORDER.index(target) <= ORDER.index(layer), f"{layer} imports {name}, a later layer"


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) == "kernels"], ids=lambda path: path.name)
def test_kernels_stand_alone(path):
    """Only torch, triton, the standard library and relative imports: the folder could be published by itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = {node.module.split(".")[0]}
        else:
            continue
        assert roots <= {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {roots}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer_of(p) in ("kernels", "ops", "losses")], ids=lambda path: path.name
)
def test_trainers_are_imported_by_integrations_alone(path):
    for name in imports(path):
        assert name.split(".")[0] not in HEAVY, f"{path.name} imports {name}"


def test_the_walk_sees_imports():
    found = {name for name in imports(ROOT / "ops" / "head.py")}
    assert {"torch", "var_kernels.kernels.rows", "var_kernels.ops.checks"} <= found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Names on a circle, or on a way to one: all that remains once files without imports are taken out repeatedly."""
    graph = dict(graph)
    while free := [name for name, used in graph.items() if not used & graph.keys()]:
        for name in free:
            del graph[name]
    return sorted(graph)


def test_no_circle_of_imports():
    """In no folder, neither at import time nor inside functions."""
    files = {
        ".".join(module_of(path)): path
        for folder in ("var_kernels", "benchmarks", "tests", "examples")
        for path in (ROOT.parent / folder).rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        used = {module for module in imports(path) if module in files} - {name}
        # `from package import module` names the package too, which its __init__ alone would need.
        graph[name] = {module for module in used if not any(other.startswith(module + ".") for other in used)}
    assert {"var_kernels.integrations.hf.capture", "benchmarks.gpu_bench"} <= graph.keys()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    assert circles(graph) == []


def test_import_is_light():
    """Every public name resolves, and neither triton nor transformers comes along."""
    code = (
        "import sys, torch; before = set(sys.modules);"  # torch itself imports triton on some builds
        "import var_kernels; [getattr(var_kernels, n) for n in var_kernels.__all__];"
        "added = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(added & {'triton', 'transformers', 'datasets', 'accelerate'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'linear_logprobs'.*linear_logprob"):
        _ = var_kernels.linear_logprobs


@pytest.mark.parametrize("module", ["var_kernels", "var_kernels.ops", "var_kernels.losses"])
def test_every_public_function_says_what_it_returns(module):
    """For type checkers: without an annotation one takes `linear_logprob(...).sum()` for an error."""
    public = importlib.import_module(module)
    for name in public.__all__:
        found = getattr(public, name)
        calls = [found] if inspect.isfunction(found) else [getattr(found, "forward", None)]
        for call in filter(inspect.isfunction, calls):
            assert inspect.signature(call).return_annotation is not inspect.Signature.empty, name


OPENINGS = ("What", "Whether", "How", "Of", "As", "Where", "When", "Which", "Who", "Why", "In", "Within")


def opening(text: str) -> str:
    return text.split(maxsplit=1)[0].strip(".,:;") if text.strip() else ""


def test_docstrings_open_with_a_verb_or_a_noun_phrase():
    assert opening("Whether it runs.") in OPENINGS
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if opening(text) in OPENINGS:
                    wrong.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert wrong == []
