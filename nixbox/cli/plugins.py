"""`nixbox plugin`, and the commands that plugins bring: `nixbox PLUGIN COMMAND [ARGS…]`."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nixbox.cli.common import print_json
from nixbox.cli.options import Json
from nixbox.errors import ConfigError, NixboxError

if TYPE_CHECKING:
    from nixbox.config.settings import Loaded, Used

plugin_app = typer.Typer(help="Plugins: what there is, what one does, a new one.", no_args_is_help=True)


# --- their commands --------------------------------------------------------------------------------------


@functools.cache
def with_commands() -> dict[str, Used]:
    """The plugins of this workspace that bring commands, by name; none where there is no config that can be read."""
    try:
        return _commands(_loaded(fetch=False))
    except NixboxError:
        return {}


def _commands(loaded: Loaded) -> dict[str, Used]:
    return {used.name: used for used in loaded.plugins if used.commands}


def _loaded(*, fetch: bool = True) -> Loaded:
    from nixbox import loading, paths

    return loading.load(paths.find_workspace(Path.cwd()), fetch=fetch)


def _is_meant(name: str) -> bool:
    """Whether the config names such a plugin, though it may have faults."""
    import tomllib

    from nixbox import paths

    try:
        workspace = paths.find_workspace(Path.cwd())
        refs = tomllib.loads((workspace / paths.CONFIG_DIR / paths.CONFIG_FILE).read_text()).get("plugins", [])
    except (NixboxError, OSError, ValueError):
        return False
    return any(isinstance(ref, str) and ref.partition("@")[0].rstrip("/").rpartition("/")[2] == name for ref in refs)


def call(words: Sequence[str]) -> None:
    """Become the plugin's command that these words of the command line mean; returns if they mean none.

    All after the command's name is the command's own, `--help` and `--` included.
    """
    name = words[0]
    used = with_commands().get(name)
    if used is None and _is_meant(name):
        used = _commands(_loaded()).get(name)  # or that raises, with what is wrong
    if used is None:
        return
    rest = list(words[1:])
    machine = None
    if rest[:1] in (["-m"], ["--machine"]) and len(rest) > 1:
        machine, rest = rest[1], rest[2:]
    if not rest or rest[0] in ("-h", "--help"):
        return  # the parser shows what there is
    command = next((c for c in used.commands if c.name == rest[0]), None)
    if command is None:
        close = difflib.get_close_matches(rest[0], [c.name for c in used.commands], n=1)
        mean = f" (did you mean `{close[0]}`?)" if close else ""
        raise ConfigError(
            f"the plugin `{name}` has no command `{rest[0]}`{mean}", hint=f"`nixbox {name} --help` lists them"
        )
    from nixbox import run
    from nixbox.session import Sandbox, hooks

    box = Sandbox.open(Path.cwd(), machine)
    program = used.directory / command.run
    env = hooks.context(box.machine, os.environ, used)
    env.pop(hooks.EVENT, None)
    try:
        run.replace([str(program), *rest[1:]], env=env, cwd=box.workspace)
    except OSError as error:
        raise NixboxError(
            f"{program} cannot be executed: {error.strerror}", hint="does its first line name its interpreter?"
        ) from None


def group(used: Used) -> typer.Typer:
    """A plugin's commands as the parser has them: for help and for the shell's completion."""
    from nixbox.report import harmless

    app = typer.Typer(
        name=used.name,
        help=harmless(used.description),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)
    for command in used.commands:
        app.command(command.name, help=harmless(command.description))(lambda: None)
    return app


# --- the plugins themselves ------------------------------------------------------------------------------


def _workspace() -> Path | None:
    from nixbox import paths

    try:
        return paths.find_workspace(Path.cwd())
    except ConfigError:
        return None


@plugin_app.command("list")
def plugin_list(as_json: Json = False) -> None:
    """The plugins that can be named here, and which of them this workspace uses."""
    from nixbox import loading, view
    from nixbox.config import plugins
    from nixbox.config.load import load_plugin
    from nixbox.report import harmless

    workspace = _workspace()
    sources = loading.sources(workspace or Path.cwd())
    uses = {used.ref: used for used in (loading.load(workspace).plugins if workspace else ())}
    rows: list[dict[str, object]] = []
    for place in dict.fromkeys(p.name for home in plugins.homes(workspace or Path("/")) for p in plugins.named(home)):
        try:
            found, plugin = load_plugin(workspace or Path.cwd(), place, sources)
            words, where = plugin.description, str(found.source)
        except NixboxError as error:
            words, where = f"cannot be used: {'; '.join(getattr(error, 'faults', ())) or error.message}", ""
        rows.append({"name": place, "used": place in uses, "directory": where, "description": words})
    for ref, used in uses.items():
        if ref not in {row["name"] for row in rows}:
            rows.append({"name": ref, "used": True, "directory": str(used.source), "description": used.description})
    if as_json:
        print_json(rows)
    else:
        cells = [[str(r["name"]), "yes" if r["used"] else "", harmless(str(r["description"]))] for r in rows]
        view.print_rows(cells, ["NAME", "USED", "WHAT IT IS"])


@plugin_app.command("show")
def plugin_show(
    plugin: Annotated[str, typer.Argument(help="A plugin as config.toml would name it.")], as_json: Json = False
) -> None:
    """All that a plugin would add to this workspace."""
    import json

    from nixbox import loading
    from nixbox.config.load import load_plugin
    from nixbox.report import harmless

    workspace = _workspace() or Path.cwd()
    found, said = load_plugin(workspace, plugin, loading.sources(workspace))
    tree = said.model_dump(by_alias=True, exclude_unset=True)
    if as_json:
        print_json({"name": found.name, "directory": str(found.source), "plugin": tree})
        return
    print(f"{found.name}: {harmless(said.description)}\n\nfrom {found.source / found.file.name}")
    for name, value in tree.items():
        if name == "description":
            continue
        entries = value if isinstance(value, list) else [value]
        print(f"\n{name}:")
        for entry in entries:
            text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
            print("\n".join(f"  {harmless(line)}" for line in text.strip().splitlines()))
    readme = found.source / "README.md"
    if readme.is_file():
        print(f"\nmore: {readme}")


@plugin_app.command("new")
def plugin_new(
    name: Annotated[str, typer.Argument(help="What it is called.")],
    directory: Annotated[
        Path | None, typer.Option("--in", help="Where to make its directory; default: .nixbox/plugins.")
    ] = None,
) -> None:
    """Write a working plugin to begin with: a command, a hook, a README and a test."""
    from nixbox.config import skeleton

    workspace = _workspace()
    place, ref = skeleton.place(name, workspace, directory)
    skeleton.write(name, place, ref)
    shown = os.path.relpath(place)
    print(
        f"wrote {shown}; to use it: plugins = [{ref!r}] in config.toml; to test it: {shown}/test".replace("'", '"'),
        file=sys.stderr,
    )


@plugin_app.command("reference")
def plugin_reference() -> None:
    """All that plugin.toml may say, as Markdown."""
    from nixbox.config.reference import plugin_reference as reference

    print(reference(), end="")
