"""The configuration reference in Markdown, from the dataclasses: `python -m fvtitan.config --reference > docs/config.md`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fvtitan.methods import METHODS
from fvtitan.methods.base import MethodConfig
from fvtitan.models import families

INTRO = """# Configuration

Every key of a recipe, from the dataclasses: `python -m fvtitan.config --reference > docs/config.md` writes this page.

A key that the TOML file leaves out has its default, and the command line goes over both: `--training.steps 3000`,
`--ema.enable true`, `--optimizer.betas 0.9 0.99`. In TOML an int may stand for a float; nothing else is converted. Unknown keys
and values that are not allowed are errors before any work. `python -m fvtitan.config FILE` prints what a recipe comes to."""


def key_docs(cls: type) -> dict[str, str]:
    """The keys that a dataclass declares itself, and the docstring under each; empty: it has none."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            docs[node.target.id] = text.value if isinstance(text, ast.Constant) else ""
    return docs


def sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """(its name in brackets, its dataclass) of every TOML section below a dataclass, in their order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], f"{path}{field.name}"
        if typing.get_origin(kind) is dict:
            kind, name = typing.get_args(kind)[1], f"{name}.<role>"
        if dataclasses.is_dataclass(kind):
            yield name, kind
            yield from sections(kind, f"{name}.")


def _allowed(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_allowed(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else _allowed(arg) for arg in args)}]"
    return annotation.__name__


def _default(value: Any) -> str:
    """As TOML has it."""
    return "unset" if value is None else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """On one line, without what would end a cell or begin a tag."""
    text = " ".join(text.split()).replace("|", r"\|")
    return re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(cls: type, keys: Iterable[str]) -> list[str]:
    """The table of these keys of a section."""
    hints, defaults, docs = (
        typing.get_type_hints(cls),
        {f.name: f.default for f in dataclasses.fields(cls)},
        key_docs(cls),
    )
    if cls is MethodConfig:  # the registry is what is allowed
        hints["name"], defaults["name"] = Literal[*METHODS], "finetune"
    rows = [_row(f"`{key}`", _allowed(hints[key]), _default(defaults[key]), _cell(docs[key])) for key in keys]
    return [_row("key", "allowed", "default", "meaning"), _row(*["---"] * 4), *rows]


def _section(name: str, cls: type) -> list[str]:
    about = (inspect.getdoc(cls) or "").partition(": ")[2]  # what follows "[section]: "
    keys = [key for key, kind in typing.get_type_hints(cls).items() if not dataclasses.is_dataclass(kind)]
    return [
        "",
        f"## `[{name}]`",
        "",
        *([_cell(about[:1].upper() + about[1:]), ""] if about else []),
        *_table(cls, keys),
    ]


def _method(name: str) -> list[str]:
    """The method's own keys. `name` is in the section of all methods, inherited keys in that of the method it extends."""
    method = METHODS[name]
    roles = [f"`{role}`" for role in method.roles] + [f"`{role}` (optional)" for role in method.optional_roles]
    lines = ["", f"### `{name}`", "", _cell(method.__doc__ or "")]
    lines += [f"Roles: {', '.join(roles)}; the student is {families(causal=method.causal_student)}."]
    lines += [
        f"Its keys are those of `{other}` and" for other in METHODS if METHODS[other].Config is method.Config.__base__
    ]
    return [*lines, "", *_table(method.Config, [key for key in key_docs(method.Config) if key != "name"])]


def reference(job_config: type) -> str:
    """The whole page. `job_config`: `fvtitan.config.JobConfig`."""
    lines = [INTRO]
    for name, cls in sections(job_config):
        lines += _section(name, cls)
        if cls is MethodConfig:
            for method in METHODS:
                lines += _method(method)
    return "\n".join(lines) + "\n"
