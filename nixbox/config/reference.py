"""The reference of plugin.toml, made from the models that check it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from nixbox.config.schema import Plugin


def plugin_reference() -> str:
    """Markdown: a table of fields for the file and for each table in it."""
    return "\n".join(_sections(Plugin, "plugin.toml", set())) + "\n"


def _sections(model: type[BaseModel], title: str, done: set[type[BaseModel]]) -> Iterator[str]:
    done.add(model)
    words = " ".join((model.__doc__ or "").split())
    yield from (f"## {title}", "", words, "", "| field | what it is | default |", "| --- | --- | --- |")
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        shown = field.alias or name
        yield f"| `{shown}` | {field.description or ''} | {_default(field)} |"
        for found, many in _models(field.annotation):
            inner.append((found, f"[[{shown}]]" if many else f"[{shown}]"))
    for reason_of, reason in getattr(model, "refused", {}).items():
        yield f"| ~~`{reason_of}`~~ | {reason} | |"
    yield ""
    for found, heading in inner:
        if found not in done:
            yield from _sections(found, heading, done)


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`"


def _models(annotation: Any, many: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The models inside a field's type, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, many
        return
    for argument in get_args(annotation):
        yield from _models(argument, many or getattr(annotation, "__origin__", None) is list)
