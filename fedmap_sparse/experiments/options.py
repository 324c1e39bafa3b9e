"""A dataclass as a set of options: fields are checked, parsed, written and explained."""

from __future__ import annotations

import difflib
import json
import math
import operator
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

from fedmap_sparse import _files
from fedmap_sparse._text import shown
from fedmap_sparse.errors import ConfigError

Value = bool | int | float | str
Options = type[Any]  # the dataclass

_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
#: Native code takes no larger integer.
_MOST = 2**63 - 1
_WANTED = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def option(default: Value | None, group: str, text: str, **rules: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value unless given.
        group: the heading it stands under.
        text: its meaning and unit.
        rules: `choices`; `least`, `above`, `most`, `below`; `needs`, another option and the values
            of it without which this one must stay None; `fill`, the value that None then becomes,
            or a dict from the value of the needed option to it; `default_text`, what help says in
            the default's place.
    """
    return field(default=default, metadata={"group": group, "text": text, **rules})


def check(options: Any) -> None:
    """Check types, choices and ranges of what is given; an int given for a float becomes one.

    Raises:
        ConfigError: for the first option that is wrong.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is not None or not _kind(f, options)[1]:
            object.__setattr__(options, f.name, _checked(f, options, value))


def fill(options: Any) -> None:
    """Give options that apply their default, and refuse those that do not.

    Raises:
        ConfigError: an option that goes with another value of the one it needs.
    """
    for f in fields(options):
        if "needs" not in f.metadata:
            continue
        needed, values = f.metadata["needs"]
        given = getattr(options, needed)
        if given not in values:
            if getattr(options, f.name) is not None:
                wanted = " or ".join(values)
                raise ConfigError(
                    f"{f.name}: goes with {needed}={wanted}, not with {needed}={given}"
                )
        elif getattr(options, f.name) is None:
            filled = f.metadata.get("fill")
            filled = filled[given] if isinstance(filled, dict) else filled
            object.__setattr__(options, f.name, filled)


def check_names(kind: Options, names: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is no option, with the nearest one that is."""
    known = [f.name for f in fields(kind)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:50].replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            raise ConfigError(f"unknown option {shown(name)}; {hint}")


def read_file(path: Path, tables: Sequence[str] = ()) -> dict[str, Any]:
    """The options in a TOML file of `key = value` lines, unchecked.

    Args:
        tables: names that may be tables.

    Raises:
        ConfigError: a file that is missing, not TOML, or has other tables.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    return parse(text, path, tables)


def parse(text: str, path: Path, tables: Sequence[str] = ()) -> dict[str, Any]:
    """As `read_file`, of a text; `path` is named in errors."""
    try:
        values = tomllib.loads(text)
    # ValueError: not TOML, or a number of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for key, value in values.items():
        if isinstance(value, dict) and key not in tables:
            raise ConfigError(
                f"{path}: expected `key = value` lines alone, got a table [{key[:50]}]"
            )
    return values


def read_text(path: Path) -> str:
    """A file of options as text: an ordinary file of at most 1 MiB in UTF-8.

    Raises:
        OSError: it cannot be read, or is none of that size.
        ValueError: it is not UTF-8.
    """
    return _files.read_regular(path, 1 << 20).decode()


def read_words(kind: Options, words: Sequence[str]) -> dict[str, Any]:
    """The options in `key=value` words of a command line, each in its option's type.

    An empty value means None where there is one. Names are checked later (`check_names`).

    Raises:
        ConfigError: a word of another form, or a value of another type.
    """
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {shown(word)}")
        values[key] = _parsed(known[key], kind, text) if key in known else text
    return values


def toml(value: Value) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's strings are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def groups(kind: Options) -> dict[str, list[Field[Any]]]:
    """Fields by their heading, in order."""
    found: dict[str, list[Field[Any]]] = {}
    for f in fields(kind):
        found.setdefault(f.metadata["group"], []).append(f)
    return found


def help_text(kind: Options, width: int = 100) -> str:
    """Every option by group, with default, choices and meaning."""
    margin = 32
    parts = []
    for group, members in groups(kind).items():
        lines = [f"{group}:"]
        for f in members:
            start = f"  {f.name}={_default_text(f)}"
            if len(start) > margin - 2:
                lines.append(start)
                start = ""
            lines += textwrap.wrap(
                _explained(f, kind),
                width,
                initial_indent=start.ljust(margin),
                subsequent_indent=" " * margin,
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _explained(f: Field[Any], kind: Options) -> str:
    text = str(f.metadata["text"])
    if "choices" in f.metadata:
        text += f": {', '.join(f.metadata['choices'])}"
    if "needs" in f.metadata:
        needed, values = f.metadata["needs"]
        choices = next(g for g in fields(kind) if g.name == needed).metadata["choices"]
        if len(values) < len(choices):
            text += f" (with {needed}={' or '.join(values)})"
    return text


def _default_text(f: Field[Any]) -> str:
    if "default_text" in f.metadata:
        return f"<{f.metadata['default_text']}>"
    value = f.metadata.get("fill") if f.default is None else f.default
    if isinstance(value, dict):
        return "<" + ", ".join(f"{v} with {k}" for k, v in value.items()) + ">"
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def _kinds(kind: Options) -> dict[str, tuple[type, bool]]:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        args = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = (next(a for a in args if a is not type(None)), type(None) in args)
    return found


def _kind(f: Field[Any], options: Any) -> tuple[type, bool]:
    """The type of an option, and whether it can be None."""
    return _kinds(options if isinstance(options, type) else type(options))[f.name]


def _checked(f: Field[Any], options: Any, given: Any) -> Value:
    kind, _ = _kind(f, options)
    rules = f.metadata
    value: Any = float(given) if kind is float and _fits_float(given) else given
    if type(value) is not kind:
        raise ConfigError(f"{f.name}: expected {_WANTED[kind]}, got {shown(given)}")
    if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        raise ConfigError(f"{f.name}: expected text in UTF-8 without NUL, got {shown(value)}")
    if value not in rules.get("choices", (value,)):
        near = difflib.get_close_matches(str(value)[:50], rules["choices"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        wanted = ", ".join(rules["choices"])
        raise ConfigError(f"{f.name}: expected one of {wanted}, got {shown(value)}{hint}")
    number: Any = 0 if isinstance(value, str) else value
    if kind is int and "most" not in rules and number > _MOST:
        raise ConfigError(f"{f.name}: expected at most 2^63 - 1, got {shown(value)}")
    bounds = [(words, holds, rules[key]) for key, (words, holds) in _BOUNDS.items() if key in rules]
    finite = kind is not float or math.isfinite(number)
    if not finite or not all(holds(number, bound) for _, holds, bound in bounds):
        wanted = " and ".join(f"{words} {bound}" for words, _, bound in bounds)
        raise ConfigError(f"{f.name}: expected {wanted or 'a finite number'}, got {shown(value)}")
    return cast(Value, value)


def _fits_float(value: Any) -> bool:
    return type(value) is int and abs(value) <= 1 << 1023


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        return False
    return True


def _parsed(f: Field[Any], options: Options, text: str) -> Value | None:
    kind, optional = _kind(f, options)
    if text == "" and optional:
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return cast(Value, kind(text))
    except (KeyError, ValueError):
        raise ConfigError(f"{f.name}: expected {_WANTED[kind]}, got {shown(text)}") from None
