"""The parser: every command of nixbox with its options, as typer takes them apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from nixbox.cli import (
    copying,
    docs,
    env,
    images,
    machines,
    mounts,
    net,
    options,
    plugins,
    quick,
    seeds,
    stores,
    update,
    workspace,
)
from nixbox.cli.common import Interrupted, PipeClosed, Stopped
from nixbox.errors import ExitCode


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *plugins.with_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        used = plugins.with_commands().get(cmd_name) if own is None else None
        return typer.main.get_command(plugins.group(used)) if used is not None else own

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        from nixbox.report import harmless

        own = [(name, TyperGroup.get_command(self, ctx, name)) for name in TyperGroup.list_commands(self, ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(90)) for name, command in own if command])
        rows = [
            (f"{used.name} {command.name}", harmless(command.description))
            for used in plugins.with_commands().values()
            for command in used.commands
        ]
        if rows:
            with formatter.section("Commands of this workspace's plugins"):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            raise Interrupted(stopped.code) from None
        except KeyboardInterrupt:
            raise Interrupted(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            raise PipeClosed from None


app = typer.Typer(
    name="nixbox",
    cls=_Commands,
    help="One command turns a directory into a microVM whose image Nix built from a lock file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(stores.image_app, name="image")
app.add_typer(stores.template_app, name="template")
app.add_typer(net.net_app, name="net")
app.add_typer(env.env_app, name="env")
app.add_typer(net.port_app, name="port")
app.add_typer(plugins.plugin_app, name="plugin")


def _is_of_machines(function: object) -> bool:
    return getattr(function, "__module__", "") == machines.__name__


def _add(command: Callable[..., Any], name: str | None = None, **settings: Any) -> None:
    if _is_of_machines(command):
        options.typed(command)
    app.command(name, context_settings=settings or None)(command)


# In the order in which `--help` lists them.
_add(workspace.init)
_add(workspace.trust)
_add(machines.up)
_add(machines.down)
_add(machines.shell)
_add(machines.run_command, "run", allow_interspersed_args=False)
_add(machines.suspend)
_add(machines.fork)
_add(machines.status)
_add(machines.list_machines, "list")
_add(machines.logs)
_add(machines.rm)
_add(mounts.mount)
_add(mounts.unmount)
_add(seeds.seed)
_add(copying.cp)
_add(workspace.lock)
_add(update.update)
_add(images.build)
_add(workspace.config)
_add(machines.ssh_config, "ssh-config")
_add(docs.docs)
_add(workspace.doctor)
_add(workspace.version)


def _name(command: Any) -> str:
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


def _asked_for(words: Sequence[str]) -> typer.Typer:
    """The program with the one command that was asked for: to describe all of them to the parser takes longer."""
    found = [c for c in app.registered_commands if _name(c) in words[:1]]
    if not found:
        groups = [group.name for group in app.registered_groups]
        if words and not words[0].startswith("-") and words[0] not in groups:
            plugins.call(words)
        return app
    return _only(found)


def _only(commands: list[Any]) -> typer.Typer:
    only = copy.copy(app)
    only.registered_commands, only.registered_groups = commands, []
    only.callback()(lambda: None)  # one command alone would be the whole program, without a name of its own
    return only


def run(words: Sequence[str], *, keeps: bool = False) -> object:
    """Run a command line (without the program's name); returns what the command does. `keeps`: for `quick` as well.

    Raises what the command raises, and the parser's own exceptions.
    """
    if keeps:
        ours = [c for c in app.registered_commands if _is_of_machines(c.callback)]
        if any(_name(c) in words[:1] for c in ours):
            group: Any = typer.main.get_command(_only(ours))
            quick.keep(group.commands)
    return _asked_for(words)(list(words), standalone_mode=False, prog_name="nixbox")
