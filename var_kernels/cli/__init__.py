"""The command line: ``var-kernels train | methods | doctor | memory | bench``.

Each command is a module here with ``add_arguments(parser)`` and ``run(args) -> int``, and, where it takes more options
than it declares, ``take_unknown(args, words)``. A module is imported when its command is given, torch and transformers
when it runs.
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import re
import sys

COMMANDS = {
    "train": "align a causal LM by VAR, or another method, on rows with rewards or pairs",
    "methods": "list the training methods, or say all about one",
    "doctor": "say what this machine has and which backend runs, and check it against fp64",
    "memory": "predict the peak memory of a batch's loss, plain and fused, from sizes alone",
    "bench": "measure the gain on this machine for a model's head, against the losses that are installed",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 (refused: the message says why) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from var_kernels import __version__

        print(f"var-kernels {__version__}")
        return 0
    name, *words = argv
    if name not in COMMANDS:
        known = f"commands: {', '.join(COMMANDS)}"
        return _fail("var-kernels", f"unknown command {name!r}{nearest(name, COMMANDS)}; {known}")
    return run_command(f"var-kernels {name}", COMMANDS[name], importlib.import_module(f"var_kernels.cli.{name}"), words)


def run_command(program: str, description: str, command, words: list[str]) -> int:
    """Parse the words and run the command, a module as above; returns ``main``'s exit status."""
    # Read when torch is imported: beside other processes, threads that spin cost many times what they save.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where DeepSpeed is installed, importing transformers' Trainer has it say that a machine without a GPU has none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters of the data that the terminal's encoding lacks
    parser = _Parser(program, description=description, allow_abbrev=False)
    command.add_arguments(parser)
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown and hasattr(command, "take_unknown"):
            command.take_unknown(args, unknown)
        elif unknown:
            near = nearest(unknown[0], option_names(parser)) or "; --help lists the options"
            raise ValueError(f"unknown option {unknown[0]}{near}")
        status = command.run(args) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _fail(program, getattr(command, "INTERRUPTED", "interrupted"), 130)
    except BrokenPipeError as error:  # `| head`; the system's own has a number, a command's says what was lost
        _close_output()
        return 0 if error.errno else _fail(program, str(error))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("VAR_KERNELS_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno and not error.filename and not _writable_output():
            _close_output()
            error = ValueError(f"standard output must be writable, got {error.strerror!r}; send it elsewhere")
        return _fail(program, _text(error))


def _writable_output() -> bool:
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _close_output() -> None:
    """Else Python, on ending, tries once more, and says that it could not."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Raises in one line what argparse would print below twenty lines of usage."""

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": must be ", " must be ")
        raise ValueError(re.sub(r": invalid (\w+) value: (.*)", r" must be of type \1, got \2", message))


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Every --option that the parser declares."""
    return [text for action in parser._actions for text in action.option_strings if text.startswith("--")]


def nearest(word: str, names) -> str:
    """ ", did you mean X?" for the closest of the names, or nothing."""
    bare = {name.lstrip("-"): name for name in names}  # dashes alone make no likeness
    close = difflib.get_close_matches(word.split("=")[0].lstrip("-"), bare, n=1, cutoff=0.6)
    return f", did you mean {bare[close[0]]}?" if close else ""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    more = "var-kernels COMMAND --help lists a command's options, var-kernels --version says which release this is."
    return "\n".join(["usage: var-kernels COMMAND [options]", "", *lines, "", more])


def _text(error: Exception) -> str:
    """The system's errors by file and reason ("[Errno 28] ..." without), a missing package with the command for it, all
    others as they are."""
    if isinstance(error, ImportError):
        from var_kernels.integrations import missing_package

        error = missing_package(error) or error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _fail(program: str, message: str, status: int = 2) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return status
