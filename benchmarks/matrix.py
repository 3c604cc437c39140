"""Installs wheel and sdist into clean environments, runs benchmarks/matrix_check.py there, writes what came out.

make matrix                                     # python -m benchmarks.matrix dist
python -m benchmarks.matrix dist 1 3            # these rows again, the others as they were

dist holds one wheel and one sdist (make wheel). uv finds interpreters and packages; UV_INDEX and UV_FIND_LINKS name
further places, for torch's CPU builds.
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "matrix.csv"
PAGE = ROOT / "docs" / "start.md"
MARKS = ("<!-- versions -->\n", "<!-- end of versions -->\n")
PACKAGES = ("torch", "triton", "transformers", "trl", "numpy")
CHECKS = ("command", "fp64", "interpreter", "training", "compiled", "VARTrainer", "SFTTrainer")


class Row(NamedTuple):
    """One environment: what is not pinned is the newest that fits."""

    python: str
    extras: str  # of pyproject.toml; none: torch alone
    pins: tuple[str, ...] = ()
    sdist: bool = False


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lower_bounds(*extras: str) -> dict[str, str]:
    """{package: its oldest version} by pyproject.toml, of the package itself and of these extras."""
    table = project()
    lines = [*table["dependencies"], *(line for name in extras for line in table["optional-dependencies"][name])]
    found = {}
    for requirement in map(Requirement, lines):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                found[requirement.name] = bound.version
    return found


OLDEST = tuple(f"{name}=={version}" for name, version in lower_bounds("hf", "triton").items())
ROWS = (
    Row("3.10", "hf,triton", OLDEST),
    Row("3.10", "hf,triton"),
    Row("3.11", "trl,triton", ("torch==2.13.0", "transformers==5.17.0", "triton==3.7.1")),
    Row("3.12", "trl,triton", ("torch==2.11.0", "transformers==5.17.0", "triton==3.6.0")),
    Row("3.13", "trl,triton"),
    Row("3.13", "", sdist=True),
)


def run(row: Row, folder: Path) -> dict[str, str]:
    """The installed versions, and of each check "right" or what it said."""
    (archive,) = folder.glob("*.tar.gz" if row.sdist else "*.whl")
    extras = f"[{row.extras}]" if row.extras else ""
    wanted = (f"var-kernels{extras} @ {archive.resolve().as_uri()}", *row.pins)
    command = [sys.executable, "-m", "uv", "run", "--isolated", "--no-project", "--no-config", "--python", row.python]
    command += [word for each in wanted for word in ("--with", each)]
    command += ["--reinstall-package", "var-kernels"]  # an archive of the same name may have been another
    check = Path(__file__).with_name("matrix_check.py")
    command += ["python", "-I", str(check), str(ROOT / "tests" / "triton_interpreter.py"), *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = {"installed from": "sdist" if row.sdist else "wheel", "python": row.python, "pins": " ".join(row.pins)}
    if done.returncode:
        return found | {"command": " ".join(done.stderr.split())[-400:] or f"status {done.returncode}"}
    return found | json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """Markdown: versions, then checks; what did not apply is empty."""
    columns = [*(name for name in rows[0] if name not in (*CHECKS, "pins")), "checks"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        wrong = [f"{name}: {row[name]}" for name in CHECKS if row[name] not in ("right", "")]
        ran = [name for name in CHECKS if row[name] == "right"]
        verdict = "; ".join(wrong).replace("|", "\\|") or f"right: {', '.join(ran)}"
        lines.append(f"| {' | '.join(row[name] for name in columns[:-1])} | {verdict} |")
    return "\n".join(lines) + "\n"


def read(path: Path = RESULTS) -> list[dict]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def update(page: Path, rows: list[dict]) -> None:
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    text, count = re.subn(pattern, lambda _: MARKS[0] + table(rows) + MARKS[1], page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(
            f"{page} must hold the marks {MARKS} once, found {count}; put them where the table is to stand"
        )
    page.write_text(text)


def main(folder: Path, again: list[int]) -> int:
    """All rows, or those of these numbers, counted from 1, again."""
    columns = ("installed from", "python", *PACKAGES, *CHECKS, "pins")
    rows = read() if again else [{}] * len(ROWS)
    for number, row in enumerate(ROWS, 1):
        if again and number not in again:
            continue
        print(f"{number} of {len(ROWS)}: Python {row.python}, {', '.join(row.pins) or 'newest'}", file=sys.stderr)
        rows[number - 1] = dict.fromkeys(columns, "") | run(row, folder)
        print("  " + "; ".join(f"{name} {text}" for name, text in rows[number - 1].items() if text), file=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with RESULTS.open("w", newline="") as out:
        print(f"# python -m benchmarks.matrix: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", file=out)
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)
    update(PAGE, rows)
    return int(any(row[name] not in ("right", "") for row in rows for name in CHECKS))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]))
