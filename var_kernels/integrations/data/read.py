"""Rows from a local file or the hub, each with the place it came from, so that what is wrong can be named by line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from var_kernels.integrations import install_command
from var_kernels.integrations.data.forms import DataError, Example, Problem, RewardNeed, key_names, parse_row

_SPACE = re.compile(r"[ \t\r\n]*")
LOCAL_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def load_examples(
    dataset: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    need_rewards: RewardNeed = "optional",
    skip_malformed: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Example], list[Problem]]:
    """Read and check a whole data set.

    Args:
        dataset: a ``.json``, ``.jsonl`` (both also ``.gz``) or ``.parquet`` file, or the name of a data set on the hub.
        split, subset: for a hub name, whose default split is "train"; a local file is read whole.
        need_rewards: "required", "unless_pair" (a pair is ordered without them), "optional", or "prompt" (a prompt
            alone will do).
        skip_malformed: leave out malformed rows and return them as problems, where the default raises.
        columns: columns wanted -> their names in the data, {"prompt": "question"}.

    Returns:
        The examples in file order, and the problems of the rows left out.

    Raises:
        FileNotFoundError: a local name that does not exist.
        ValueError: a directory, an unknown ending, a split of a local file.
        DataError: malformed rows, an unreadable file, or no row at all.
    """
    examples, problems = [], []
    for where, row in _rows(str(dataset), split, subset):
        row = renamed(row, columns or {}, where)
        parsed = row if isinstance(row, Problem) else parse_row(row, where, need_rewards)
        (problems if isinstance(parsed, Problem) else examples).append(parsed)
    if problems and not skip_malformed:
        raise DataError(problems)
    if not examples:
        remedy = "no other row is left to use; mend some" if problems else "name a file with rows"
        raise DataError(problems or [Problem(str(dataset), "must hold at least one row, got none")], remedy=remedy)
    return examples, problems


def renamed(row: object, columns: Mapping[str, str], where: str) -> object:
    """The row under the names wanted; a name that it has not is a problem."""
    if not columns or not isinstance(row, Mapping):
        return row
    if absent := [name for name in columns.values() if name not in row]:
        return Problem(where, f"columns must name keys of the row, {key_names(row)}, got {absent[0]!r}")
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {wanted: row[name] for wanted, name in columns.items()}


def is_local(dataset: str) -> bool:
    """Return whether the name is that of a local file, by its ending, rather than one of the hub."""
    return dataset.endswith(LOCAL_SUFFIXES)


def _rows(dataset: str, split: str | None, subset: str | None) -> Iterator[tuple[str, object]]:
    path = Path(dataset)
    is_local_name = is_local(dataset)
    if path.is_dir():
        raise ValueError(
            f"dataset must be one file ({', '.join(LOCAL_SUFFIXES)}) or a name on the hub, got the folder {dataset}; "
            "name a file in it"
        )
    if path.is_file() and not is_local_name:
        raise ValueError(
            f"dataset must have one of the endings {', '.join(LOCAL_SUFFIXES)}, got {dataset}; rename or convert it"
        )
    if is_local_name and not path.is_file():
        raise FileNotFoundError(f"dataset must be an existing file or a name on the hub, got {dataset}; check the path")
    for name, value in (("split", split), ("subset", subset)):
        if is_local_name and value is not None:
            raise ValueError(
                f"{name} must be unset for a local file, which is read whole, got {value!r} with {dataset}; drop it"
            )
    if not is_local_name or dataset.endswith(".parquet"):
        return _arrow_rows(dataset, split, subset)
    return _json_rows(path)


def _arrow_rows(dataset: str, split: str | None, subset: str | None) -> Iterator[tuple[str, object]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {dataset} needs the datasets package; {install_command('hf')}") from error
    try:
        if dataset.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=dataset, split="train")
        else:
            rows = datasets.load_dataset(dataset, subset, split=split or "train")
    except Exception as error:
        kind = "a Parquet file" if dataset.endswith(".parquet") else "a data set of the hub, nor a local file"
        reason = f"cannot be read as {kind}: {error!s:.500}"  # those of Arrow show whole tables' types
        raise DataError([Problem(dataset, reason)], remedy="check the name") from error
    for i in range(len(rows)):
        yield f"{dataset} row {i + 1}", rows[i]


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Line by line, unless the first character is "[": then one array, whose elements are named by the line they begin
    on."""
    opener = gzip.open if path.name.endswith(".gz") else open
    line_number = 0
    try:
        with opener(path, "rb") as file:
            if _first_byte(file) == b"[":
                yield from _array_rows(path, file.read().decode("utf-8-sig"))
                return
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{line_number}", _parse_line(path, line_number, line)
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        yield f"{path}:{line_number + 1}", Problem(f"{path}:{line_number + 1}", f"unreadable from here on: {error}")


def _first_byte(file) -> bytes:
    """The first byte that is neither space nor byte-order mark; the file is back at its beginning afterwards."""
    byte = file.read(1)
    while byte and byte in b"\xef\xbb\xbf \t\r\n":
        byte = file.read(1)
    file.seek(0)
    return byte


def _parse_line(path: Path, line_number: int, line: bytes) -> object:
    where = f"{path}:{line_number}"
    try:
        return json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8").rstrip())
    except UnicodeDecodeError as error:
        return Problem(where, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return Problem(where, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Problem(where, "not JSON that can be read: nested too deeply")


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    decoder, at, line_number = json.JSONDecoder(), text.index("[") + 1, 1
    line_number += text.count("\n", 0, at)

    while True:
        start = _SPACE.match(text, at).end()
        line_number += text.count("\n", at, start)
        where = f"{path}:{line_number}"
        if text[start : start + 1] == "]":
            break
        try:
            row, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at column {error.colno}; nothing after it was read"
            yield where, Problem(f"{path}:{error.lineno}", reason)
            return
        except RecursionError:
            yield where, Problem(where, "not JSON that can be read: nested too deeply; nothing after it was read")
            return
        yield where, row
        comma = _SPACE.match(text, end).end()
        line_number += text.count("\n", start, comma)
        if text[comma : comma + 1] == ",":
            at = comma + 1
        elif text[comma : comma + 1] == "]":
            start = comma
            break
        else:
            where = f"{path}:{line_number}"
            yield where, Problem(where, "not JSON: expected ',' or ']' after an element; nothing after it was read")
            return
    after = _SPACE.match(text, start + 1).end()
    if after < len(text):  # two files in one
        where = f"{path}:{line_number + text.count(chr(10), start, after)}"
        reason = f"not JSON: expected nothing after the array, got {text[after : after + 20]!r}; write one array"
        yield where, Problem(where, reason)
