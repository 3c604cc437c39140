"""MkDocs hooks: files of the repository that pages link to join the site; messages are read from the sources."""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".h": "cpp", ".inc": "cpp"}


def _source(uri: str) -> str:
    """A page's path in the repository."""
    return uri.removeprefix("files/").removesuffix(".shown.md") if uri.startswith("files/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """Where a file of the repository is in the site's sources: code is shown on a page."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}{'.shown.md' if Path(path).suffix in _LANGUAGES else ''}"


def _targets(uri: str, markdown: str):
    """(match, path in the repository) of every relative link."""
    for match in _LINK.finditer(markdown):
        if "://" not in match[2] and not match[2].startswith("mailto:"):
            yield match, posixpath.normpath(posixpath.join(posixpath.dirname(_source(uri)), match[2]))


def on_files(files, config):
    """Adds what pages link to outside docs/, and what those files link to in turn."""
    pages = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while pages:
        uri = pages.pop()
        source = ROOT / _source(uri)
        if source.suffix != ".md":
            continue
        for _, path in _targets(uri, source.read_text(encoding="utf-8")):
            new, linked = _uri(path), ROOT / path
            if not new.startswith("files/") or files.get_file_from_path(new) or not linked.is_file():
                continue
            language = _LANGUAGES.get(linked.suffix)
            if language:
                text = linked.read_text(encoding="utf-8")
                text = f"# {linked.name}\n\n`{path}`\n\n```{language}\n{text}```\n"
                files.append(File.generated(config, new, content=text))
            else:
                files.append(File.generated(config, new, abs_src_path=str(linked)))
                pages += [new] if new.endswith(".md") else []
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to the repository become links of the site."""
    uri = page.file.src_uri
    if uri.endswith(".shown.md"):
        return markdown
    parts = []
    for part in _FENCE.split(markdown):
        if not part.startswith("```"):
            for match, path in reversed(list(_targets(uri, part))):
                new = posixpath.relpath(_uri(path), posixpath.dirname(uri) or ".")
                part = f"{part[: match.start(2)]}{new}{part[match.end(2) :]}"
        parts.append(part)
    markdown = "".join(parts)
    for marker, made in (("<!-- classes -->", _classes), ("<!-- messages -->", _messages)):
        markdown = markdown.replace(marker, made()) if marker in markdown else markdown
    return markdown


# -- every error and warning, from the sources -----------------------------------------------------------------------

_PARTS = {
    "ops": "Operations",
    "kernels": "Kernels",
    "losses": "Losses and weights",
    "integrations/hf": "Models and their heads",
    "integrations/trainer": "VARTrainer",
    "integrations/data": "Data",
    "cli": "Command line",
    "": "Trainers and calls of other libraries",
}


def _modules():
    """(part, syntax tree) of every module."""
    for path in sorted((ROOT / "var_kernels").rglob("*.py")):
        name = path.relative_to(ROOT / "var_kernels").as_posix()
        yield next(text for start, text in _PARTS.items() if name.startswith(start)), ast.parse(path.read_text("utf-8"))


def _classes() -> str:
    rows = []
    for _, tree in _modules():
        for node in ast.walk(tree):
            base = ast.unparse(node.bases[0]) if isinstance(node, ast.ClassDef) and node.bases else ""
            if base.endswith(("Error", "Warning")):
                when = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                rows.append(f"| `{node.name}` | {base} | {when} |")
    return "\n".join(sorted(rows))


def _messages() -> str:
    parts = {text: set() for text in _PARTS.values()}
    for part, tree in _modules():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or name in ("warnings.warn", "logger.warning"):
                kind = (
                    name if isinstance(node, ast.Raise) else ast.unparse(call.args[1]) if call.args[1:] else "Warning"
                )
                message = _text(call.args[0])
                if re.search(r"[a-z]{3} ", re.sub(r"{.*?}", "", message)):
                    parts[part].add(f"| {kind} | {message.replace('|', '&#124;')} |")
    head = "\n\n| class | message |\n|---|---|\n"
    by_message = {part: sorted(rows, key=lambda row: row.split(" | ", 1)[1].lower()) for part, rows in parts.items()}
    return "\n\n".join(f"### {part}{head}" + "\n".join(rows) for part, rows in by_message.items() if rows)


def _text(node: ast.expr) -> str:
    """A message as a reader sees it, values in braces."""
    if isinstance(node, ast.Constant):
        return re.sub(r"([<>*_`])", r"\\\1", " ".join(str(node.value).split("\n")))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    return f"{{{value.id}}}" if isinstance(value, ast.Name) else "{...}"
