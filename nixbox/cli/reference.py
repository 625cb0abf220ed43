"""The reference of the command line, made from the very commands that it is parsed with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from nixbox.config.reference import cell, code
from nixbox.errors import ExitCode

EXIT_CODES: Mapping[ExitCode, str] = {
    ExitCode.OK: "Done.",
    ExitCode.FAILURE: "It failed while it worked.",
    ExitCode.USAGE: "A bad argument, config, profile or lock; nothing was started.",
    ExitCode.HOST: "The host lacks a program, a right or a device; `nixbox doctor` says which.",
    ExitCode.NOT_RUNNING: "The machine is not there or not running.",
    ExitCode.DIFFERS: "`nixbox build --check` built something else than is there.",
    ExitCode.TIMEOUT: "`nixbox run --timeout` ended the command.",
    ExitCode.RUN_FAILED: "`nixbox run` itself failed, and not the command, whose own code it passes on.",
    ExitCode.INTERRUPTED: "Ctrl-C.",
}

_HEAD = """\
Data goes to stdout, words for people to stderr. `nixbox --help` and `--help` after every command say what is here;
the commands that plugins bring are listed there too. `nixbox --debug COMMAND` shows the traceback of a failure.

## Exit codes

| code | what it says |
| --- | --- |
"""


def cli_reference() -> str:
    """Markdown: the exit codes, then a section for each command with its usage, arguments and options."""
    from nixbox.cli.parser import app

    codes = "".join(f"| {int(one)} | {EXIT_CODES.get(one, '')} |\n" for one in ExitCode)
    own = sorted(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]  # it is a group
    sections = [line for name, command in own for line in _section(command, f"nixbox {name}", 2)]
    return f"{_HEAD}{codes}\n" + "\n".join(sections) + "\n"


def _section(command: Any, path: str, level: int) -> Iterator[str]:
    """The lines about a command, or about a group and each command in it."""
    yield from (f"{'#' * level} {path}", "", inspect.cleandoc(command.help or "").replace("<", "&lt;"), "")
    inner = getattr(command, "commands", None)
    if inner is not None:
        for name, one in inner.items():
            yield from _section(one, f"{path} {name}", level + 1)
        return
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    usage = " ".join([path, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)])
    yield from ("```text", usage, "```", "")
    rows = [(_argument(one), one.help) for one in arguments if one.help]
    rows += [(_option(one), (one.help or "") + _default(one)) for one in options]
    if rows:
        yield from ("| argument or option | what it is |", "| --- | --- |")
        yield from (f"| {code(name)} | {cell(words)} |" for name, words in rows)
        yield ""


def _argument(one: Any) -> str:
    """An argument as a line of usage has it; most that take several say so in words of their own."""
    name = (one.metavar or one.name.upper()).replace("...", "…")
    if one.nargs == -1 and "…" not in name:
        name += "…"
    return name if one.required or name.startswith("[") else f"[{name}]"


def _option(one: Any) -> str:
    """An option with its other names and what it takes; `…` where it may be given again."""
    names = ", ".join(one.opts)
    if one.is_flag:
        return f"{names} / {', '.join(one.secondary_opts)}" if one.secondary_opts else names
    kind = one.metavar or one.name.split("_")[-1].upper()
    return f"{names} {kind}" + (" …" if one.multiple else "")


def _default(one: Any) -> str:
    """What holds without the option, where that is not simply nothing."""
    return "" if one.is_flag or one.default is None or one.multiple else f" Default: `{one.default}`."
