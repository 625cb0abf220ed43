"""`nixbox net` and `nixbox port`: what a guest may reach, what it was refused, and who may reach it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nixbox.cli.common import print_json
from nixbox.cli.options import Json, Machine
from nixbox.errors import ConfigError

if TYPE_CHECKING:
    from nixbox.network.refusals import Refusal
    from nixbox.session import Sandbox

net_app = typer.Typer(help="What the guest may reach, and what it was refused.", no_args_is_help=True)
port_app = typer.Typer(help="Ports of the guest on this host's loopback.", no_args_is_help=True)
_POLL_S = 0.3


def _sandbox(name: str | None) -> Sandbox:
    from nixbox.session import Sandbox

    return Sandbox.open(Path.cwd(), name)


@net_app.command("status")
def net_status(machine: Machine = None, as_json: Json = False) -> None:
    """The policy that holds now, and whether there is a way out."""
    from nixbox.session import net

    box = _sandbox(machine)
    found = net.ask(box.machine)
    if as_json:
        print_json(found)
        return
    policy = found["policy"]
    print(f"mode         {policy['mode']}")
    if policy["mode"] == "filtered":
        from nixbox.network.policy import DEFAULT_PORTS

        print(f"domains      {', '.join(policy['domains']) or 'none'}")
        print(f"ports        {', '.join(map(str, policy['ports'] or DEFAULT_PORTS))}")
    if policy["mode"] != "off":
        print(f"private      {'allowed' if policy['allow_private'] else 'refused'}")
        print(f"way out      {'yes' if found['outside'] else 'not now: ' + str(found['error'] or 'attaching')}")
        print(f"name servers {', '.join(found['servers'])} (the host's)")


@net_app.command("log")
def net_log(
    machine: Machine = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as refusals come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """What the guest was refused: names and connections."""
    from nixbox.network import refusals
    from nixbox.session import net

    box = _sandbox(machine)
    mode = box.machine.load().policy.mode
    file = net.files(box.machine).refused
    shown = 0
    while True:
        found = list(refusals.read(file))
        if len(found) < shown:  # the oldest were dropped
            shown = 0
        for refusal in found[shown:]:
            _print_refusal(refusal, mode, as_json=as_json)
        shown = len(found)
        if not follow:
            return
        time.sleep(_POLL_S)


def _print_refusal(refusal: Refusal, mode: str, *, as_json: bool) -> None:
    import json

    from nixbox.report import harmless
    from nixbox.values import asdict

    if as_json:
        print(json.dumps(asdict(refusal)), flush=True)
        return
    when = time.strftime("%H:%M:%S", time.localtime(refusal.time))
    place = refusal.address or ""
    if refusal.port is not None and refusal.protocol != "dns":
        place = f"{place}:{refusal.port}"
    name = harmless(refusal.name or "")
    what = " ".join(filter(None, (name, f"({place})" if name and place else place)))
    mend = ""
    if mode == "filtered" and refusal.reason == "not in network.domains":
        mend = f"; nixbox net allow {name}"
    print(f"{when} {refusal.protocol:4} {what}: {refusal.reason}{mend}", flush=True)


@net_app.command("allow")
def net_allow(
    domains: Annotated[list[str], typer.Argument(metavar="DOMAIN...")],
    machine: Machine = None,
    save: Annotated[
        bool | None, typer.Option("--save/--no-save", help="Write it to config.toml too, without asking.")
    ] = None,
) -> None:
    """Let the running guest reach further domains, at once; subdomains are covered."""
    from nixbox import paths
    from nixbox.session import net

    box = _sandbox(machine)
    net.allow(box.machine, domains)
    words = ", ".join(f"`{domain}`" for domain in domains)
    print(f"{words}: allowed until the machine stops", file=sys.stderr)
    config = box.workspace / paths.CONFIG_DIR / paths.CONFIG_FILE
    if not config.exists():  # it is written in Nix's language
        if save:
            raise ConfigError(
                f"{config.with_suffix('.nix')} is yours to change", hint="nixbox init --from makes it TOML"
            )
        return
    if save is None:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            print("to keep it: the same with --save", file=sys.stderr)
            return
        save = typer.confirm(f"write it to {config}?", default=False, err=True)
    if save:
        new = net.write_domains(config, domains)
        print(f"{config}: {', '.join(new) or 'had it already'}", file=sys.stderr)


@port_app.command("add")
def port_add(
    ports: Annotated[str, typer.Argument(metavar="HOST:GUEST")],
    machine: Machine = None,
) -> None:
    """Publish a port of the running guest on this host's loopback, now and at every later start."""
    from nixbox.session import ports as publishing

    pair = publishing.parse(ports)
    box = _sandbox(machine)
    box.require_running()
    with box.busy():
        publishing.add(box.machine, pair)
    print(f"127.0.0.1:{pair[0]} is the guest's port {pair[1]}", file=sys.stderr)


@port_app.command("list")
def port_list(machine: Machine = None, as_json: Json = False) -> None:
    """The published ports."""
    from nixbox import view
    from nixbox.session import ports as publishing

    box = _sandbox(machine)
    rows = publishing.listing(box.machine, box.plan().machine.published)
    if as_json:
        print_json(rows)
    elif rows:
        cells = [[f"127.0.0.1:{row['host']}", str(row["guest"]), "yes" if row["active"] else "no"] for row in rows]
        view.print_rows(cells, ["HOST", "GUEST", "ACTIVE"])
    else:
        print("no ports: `nixbox port add HOST:GUEST` publishes one", file=sys.stderr)


@port_app.command("rm")
def port_rm(
    host: Annotated[int, typer.Argument(metavar="HOST")],
    machine: Machine = None,
) -> None:
    """Take a published port back. One of the config comes back at the next `nixbox up`."""
    from nixbox.session import ports as publishing

    box = _sandbox(machine)
    with box.busy():
        if not publishing.remove(box.machine, host):
            raise ConfigError(f"port {host} is not published", hint="`nixbox port list` shows those that are")
    print(f"port {host} is no longer published", file=sys.stderr)
