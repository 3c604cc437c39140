"""Options from flags and YAML files, and texts of the form "key=value,key=value"."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_kernels.cli import nearest

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """An argument's type: an integer of at least 1 that a tensor's size can be."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be less than 2^31, got {text}")
    return int(text)


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file; its keys are flag names, with - or _."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"config must be an existing YAML file, got {path}; check the path") from None
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise ValueError(f"config must be UTF-8, got {path} with an {place}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML, got {path}; correct it where the parser stops: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} must hold 'name: value' lines, got a {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def pair_up(words: list[str]) -> dict[str, Any]:
    """["--bf16", "--seed", "3", "--a=b"] -> {"bf16": True, "seed": "3", "a": "b"}.

    Raises:
        ValueError: a word that is neither an option nor the value of one.
    """
    options, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = value if equals else True
            name = None if equals else name
        elif name is None:
            raise ValueError(
                f"each word must be an option (--name) or the one value of the option before it, got {word!r}; quote a "
                "value with spaces"
            )
        else:
            options[name], name = word, None
    return options


def coerce(name: str, value: Any, kind: str) -> Any:
    """A flag's text, or a YAML value, as the declared type ("float", "int | None", ...) wants it.

    Raises:
        ValueError: a value that is not of that type.
    """
    if value is None:
        return None
    wanted = [word for word in ("bool", "int", "float", "str", "dict", "list") if word in kind]
    # Where text is allowed "none" is a text: reference="none" is not the absence of a reference setting.
    if "None" in kind and "str" not in wanted and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if "bool" in wanted:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false", "yes", "no", "1", "0"):
            return str(value).lower() in ("true", "yes", "1")
    elif isinstance(value, bool) and wanted and "str" not in wanted:
        hint = " (a flag without a value)" if value else ""
        raise ValueError(f"{name} must be of type {' or '.join(wanted)}, got {value}{hint}")
    for word, cast in (("int", int), ("float", float)):
        if word in wanted:
            try:
                number = cast(str(value))
            except ValueError:
                continue
            return number
    if isinstance(value, str) and {"dict", "list"} & set(wanted):
        import yaml

        loaded = yaml.safe_load(value)
        return loaded if isinstance(loaded, dict | list) or "str" not in wanted else value
    if "str" in wanted and isinstance(value, str | bool):
        return value
    if not wanted or type(value).__name__ in wanted:
        return value
    raise ValueError(f"{name} must be of type {' or '.join(wanted)}, got {value!r:.60}")


def no_such_model(option: str, name: str, error: Exception) -> OSError:
    """The first line of transformers' error about a name that it cannot load, after the option's name."""
    reason = str(error).strip().splitlines()[0]
    return OSError(
        f"{option} must be a folder with a model in it, or the name of one on the hub, got {name}; check the name, and "
        f"the network: {reason}"
    )


def key_values(name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """ "a=1,b=2" over the defaults, whose types the values take.

    Raises:
        ValueError: a key that the defaults lack, a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{name} must be key=value,key=value, got {part!r}")
        if key not in defaults:
            raise ValueError(f"{name}: a key must be one of {', '.join(defaults)}, got {key!r}{nearest(key, defaults)}")
        try:
            values[key] = type(defaults[key])(value)
        except ValueError:
            raise ValueError(f"{name}: {key} must be {type(defaults[key]).__name__}, got {value!r}") from None
    return values
