"""Models, trainers and other projects' calls. The packages they need are imported where they are used; here is what to
say where one is not installed."""

import importlib.metadata
import re
from pathlib import Path

# The label of a token without loss, in every library here.
IGNORE_INDEX = -100
# Module -> the extra of this project that brings it.
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "accelerate", "datasets", "tokenizers", "peft", "yaml", "rich", "matplotlib"), "hf"
    ),
    "gguf": "gguf",
    "vaderSentiment": "dev",
    "trl": "trl",
    "deepspeed": "deepspeed",
    "pytest_benchmark": "bench",
}


def missing_package(error: ImportError) -> ImportError | None:
    """The error of a package that an extra brings, with the command that installs it; None for any other."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    text = f"{package} is not installed; {install_command(EXTRAS[package])}"
    return ModuleNotFoundError(text, name=error.name)


def install_command(extra: str) -> str:
    """The pip command for an extra: of a checkout, its path, which works from any folder; of an installed package, the
    requirements themselves, since no index has to hold this project."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install {' '.join(map(repr, _requirements(extra)))}"


def _requirements(extra: str) -> list[str]:
    found = []
    for line in importlib.metadata.requires("var-kernels") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if not re.search(f"""extra == ['"]{extra}['"]""", marker):
            continue
        inner = re.fullmatch(r"var[-_]kernels\[(.+)\]", requirement)
        found += _requirements(inner[1]) if inner else [requirement]
    return found
