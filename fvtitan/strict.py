"""Tables of TOML or JSON as dataclasses, strictly: nothing unknown, nothing converted in silence."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from typing import Any, Literal

from fvtitan.errors import UserError, did_you_mean, shortened


def dotted(key: str, name: str) -> str:
    """The key of an entry of a table, quoted where TOML would."""
    name = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    return f"{key}.{name}" if key else name


def shown(value: Any) -> str:
    """A value for the one line of an error."""
    return shortened(repr(value))


def _describe(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _parse(annotation: Any, value: Any, key: str) -> Any:
    """`value` from TOML as `annotation`, strictly: no silent conversion but int -> float and list -> tuple."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return parse_dataclass(annotation, value, key)
    if origin in (types.UnionType, typing.Union):
        return _parse(next(arg for arg in args if arg is not type(None)), value, key)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise UserError(f"{key} = {shown(value)} is not allowed.{did_you_mean(str(value)[:200], map(str, args))}")
    if origin is dict and isinstance(value, dict):
        return {name: _parse(args[1], entry, dotted(key, name)) for name, entry in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        variadic = origin is list or args[-1] is Ellipsis
        if not variadic and len(value) != len(args):
            raise UserError(f"{key} = {shown(value)}: need {len(args)} values, got {len(value)}")
        kinds = [args[0]] * len(value) if variadic else args
        return origin(
            _parse(kind, entry, f"{key}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if annotation is float and type(value) is int and float(value) == value:
        return float(value)
    if origin is None and type(value) is annotation:
        return value
    raise UserError(f"{key} = {shown(value)} has the wrong type {type(value).__name__}: need {_describe(annotation)}")


def parse_dataclass(cls: type, table: Any, key: str) -> Any:
    """A table of TOML or JSON, called `key`, as a dataclass, strictly. Raises `UserError`."""
    if not isinstance(table, dict):
        raise UserError(f"{key} = {shown(table)}: need a table [{key}]")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in table:
        if name not in names:
            where = dotted(key, name) if key else f"[{dotted(key, name)}]"
            raise UserError(f"unknown key {shortened(where)}.{did_you_mean(name[:200], names)}")
    return cls(**{name: _parse(hints[name], value, dotted(key, name)) for name, value in table.items()})


def check_numbers(tree: Any, key: str = "") -> None:
    """Raise `UserError` for a NaN or an infinity, which comparisons let pass, and for an integer beyond TOML's 64 bits."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            check_numbers(value, dotted(key, name))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            check_numbers(value, f"{key}[{i}]")
    elif isinstance(tree, float):
        if not math.isfinite(tree):
            raise UserError(f"{key} = {tree}: must be a finite number")
    elif isinstance(tree, int) and not -(2**63) <= tree < 2**63:
        raise UserError(f"{key} is an integer of more than 64 bits")
