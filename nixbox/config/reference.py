"""The reference of every file that a user writes, made from the models that check it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator

from nixbox.config import fields
from nixbox.config.schema import Config, Plugin, Profile, UserSettings


def config_reference() -> str:
    """Markdown: the fields of config.toml, a table of them for the file and for each table in it."""
    return _reference(Config, "config.toml")


def profile_reference() -> str:
    """Markdown: the fields of a profile."""
    return _reference(Profile, "profiles/NAME.toml")


def plugin_reference() -> str:
    """Markdown: the fields of plugin.toml."""
    return _reference(Plugin, "plugin.toml")


def settings_reference() -> str:
    """Markdown: the fields of the user's own settings.toml."""
    return _reference(UserSettings, "settings.toml")


def _reference(model: type[BaseModel], file: str) -> str:
    return "\n".join(_sections(model, file, "", set())) + "\n"


def _sections(model: type[BaseModel], title: str, path: str, done: set[type[BaseModel]]) -> Iterator[str]:
    """The lines about a model and those inside it; `path` is where its table is, "" for the file itself."""
    done.add(model)
    words = " ".join((model.__doc__ or "").split())
    yield from (f"## {title}", "", words, "", "| field | what it is | default |", "| --- | --- | --- |")
    inner: list[tuple[type[BaseModel], str, str]] = []
    for name, field in model.model_fields.items():
        shown = field.alias or name
        yield f"| `{shown}` | {cell(field.description or '')}{_choices(field.annotation)} | {_default(field)} |"
        below = f"{path}.{shown}" if path else shown
        for found, shape in _models(field.annotation):
            place = f"{below}.NAME" if shape is dict else below
            inner.append((found, f"[[{place}]]" if shape is list else f"[{place}]", place))
    for reason_of, reason in getattr(model, "refused", {}).items():
        yield f"| ~~`{reason_of}`~~ | {cell(reason)} | |"
    yield ""
    for found, heading, place in inner:
        if found not in done:
            yield from _sections(found, heading, place, done)


def cell(text: str) -> str:
    """Markdown text that can stand in a cell of a table: on one line, without an end of the cell and without HTML."""

    def mend(found: re.Match[str]) -> str:
        return code(found[1]) if found[1] is not None else {"|": "\\|", "<": "&lt;"}[found[0]]

    return re.sub(r"`([^`]*)`|[|<]", mend, " ".join(text.split()))


def code(text: str) -> str:
    """Code that can stand in a cell of a table. What escapes a bar there, not every Markdown takes for an escape."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _choices(annotation: Any) -> str:
    """What may stand in a field that has few values, as a further sentence."""
    if get_origin(annotation) is not Literal:
        return ""
    words = [f"`{json.dumps(value)}`" for value in get_args(annotation)]
    return f" It is {', '.join(words[:-1])} or {words[-1]}."


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.default
    if value is None or isinstance(value, BaseModel):
        return ""
    if any(isinstance(rule, BeforeValidator) for rule in field.metadata):  # sizes alone are read from text
        value = fields.format_size(value)
    if isinstance(value, list):
        value = [one.model_dump(by_alias=True) if isinstance(one, BaseModel) else one for one in value]
    return code(_toml(value))


def _toml(value: Any) -> str:
    """A default as TOML has it."""
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_toml(one)}" for key, one in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _models(annotation: Any, shape: type | None = None) -> Iterator[tuple[type[BaseModel], type | None]]:
    """The models inside a field's type, and whether they are in a `list` or a `dict` of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, shape
        return
    origin = get_origin(annotation)
    for argument in get_args(annotation):
        yield from _models(argument, origin if origin in (list, dict) else shape)
