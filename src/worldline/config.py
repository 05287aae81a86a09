"""Plain mappings into frozen dataclasses, strictly, and the meaning of every option from where it is defined."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import operator
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from worldline.core.errors import WorldlineError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Make a `cls` from `values`, nested dataclasses included. `at` is the dotted name of the place, for errors.

    Raises:
        WorldlineError: an unknown or missing option ("???" is missing), or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in values:
        if key not in fields:
            raise WorldlineError(f"unknown option {_dotted(at, key)!r}{did_you_mean(key, fields)}")
    hints = typing.get_type_hints(cls)
    made = {key: _convert(hints[key], value, _dotted(at, key)) for key, value in values.items() if value != "???"}
    missing = [name for name, field in fields.items() if name not in made and _default(field) is dataclasses.MISSING]
    if missing:
        raise WorldlineError(f"option {_dotted(at, missing[0])!r} has no default; give {_dotted(at, missing[0])}=VALUE")
    return cls(**made)


def defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the defaults of a dataclass as plain values, "???" for an option that has none."""
    found = {}
    for field in dataclasses.fields(cls):
        default = _default(field)
        if default is dataclasses.MISSING:
            hint = typing.get_type_hints(cls)[field.name]
            found[field.name] = defaults(typing.cast(Any, hint)) if dataclasses.is_dataclass(hint) else "???"
        else:
            found[field.name] = _plain(default)
    return found


def meanings(cls: type[Any], at: str = "") -> dict[str, str]:
    """Return what each option means: the string or the comment that its dataclass gives it, by dotted name."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        found |= meanings(base, at)
    hints = typing.get_type_hints(cls)
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name = node.target.id
        if dataclasses.is_dataclass(hints[name]):
            found |= meanings(typing.cast(Any, hints[name]), _dotted(at, name))
        elif (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        ):
            found[_dotted(at, name)] = " ".join(after.value.value.split())
        else:
            found[_dotted(at, name)] = _comment(lines, node)
    return found


def choices(cls: type[Any], at: str = "") -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of each option that is a `Literal`, by dotted name."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= choices(typing.cast(Any, hint), _dotted(at, name))
        elif literal := next((part for part in (hint, *get_args(hint)) if get_origin(part) is Literal), None):
            found[_dotted(at, name)] = get_args(literal)
    return found


def flatten(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return nested mappings as one, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, _dotted(at, key)) if isinstance(value, Mapping) else {_dotted(at, key): value}
    return flat


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the nearest known names, else the list of what there is, if it is short."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    if not near:  # `steps` for `joint.steps`
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        close = difflib.get_close_matches(word.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)
        near = [name for name in names if name.rsplit(".", 1)[-1] in close][:3]
    if near:
        return f"; did you mean {' or '.join(repr(name) for name in near)}?"
    return f"; there are {', '.join(names)}" if len(names) <= 12 else ""


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, at)
        try:
            return _convert(options[0], value, at)
        except WorldlineError:
            return _convert(functools.reduce(operator.or_, options[1:]), value, at)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(typing.cast(Any, hint), value, at)
    elif origin is Literal:
        if value in arguments:
            return value
        known = [str(argument) for argument in arguments]
        raise WorldlineError(f"option {at!r} cannot be {value!r}{did_you_mean(str(value), known)}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(
                _convert(kind, item, f"{at}[{i}]") for i, (kind, item) in enumerate(zip(inner, value, strict=True))
            )
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            return int(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint in (str, Path) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return hint(str(value))
    raise WorldlineError(f"option {at!r} wants {_name(hint)}, got {value!r}")


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if get_origin(hint) is tuple:
        return f"a list like [{', '.join(_name(part) for part in get_args(hint) if part is not Ellipsis)}]"
    if dataclasses.is_dataclass(hint):
        return f"options such as {', '.join(field.name for field in dataclasses.fields(hint)[:3])}"
    return words.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    last = lines[(node.end_lineno or node.lineno) - 1]
    if "#" in last:
        return last.split("#", 1)[1].strip()
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.append(line.strip().lstrip("# "))
    return " ".join(reversed(above))


def _dotted(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
