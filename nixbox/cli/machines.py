"""What is done with a machine, day in, day out.

This module does not import the parser, nor the types that its signatures name: a plain command line is taken apart
without it (quick), and `options.typed` evaluates them where it is needed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from nixbox.cli.common import print_json, reporter, sandbox
from nixbox.errors import ConfigError, ExitCode, NixboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    import typer

    from nixbox.cli.options import Json, Machine, Name, Profile
    from nixbox.session import Sandbox
    from nixbox.session.outcome import Up


def _pairs(values: list[str] | None, option: str) -> tuple[tuple[str, str], ...]:
    from nixbox.config import names

    pairs = []
    for value in values or []:
        name, equals, text = value.partition("=")
        # As the config has it: what else a shell would take for a name is not one.
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{option} takes NAME=VALUE, not {names.shown(name)}", hint="e.g. -e LOG_LEVEL=debug")
        pairs.append((name, text))
    return tuple(pairs)


def up(
    name: Name = None,
    profile: Profile = None,
    cpus: Annotated[int | None, typer.Option("--cpus", metavar="N", help="vCPUs instead of the config's.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Memory, e.g. 4GiB.")] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="auto, qemu, krun or cloud-hypervisor.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="A variable for the guest.")
    ] = None,
    env_from_host: Annotated[
        list[str] | None,
        typer.Option("--env-from-host", metavar="NAME", help="Hand this host variable to the guest."),
    ] = None,
    locked: Annotated[bool, typer.Option("--locked", help="Fail instead of changing nixbox.lock.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Boot, whatever is saved; use and make no template.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Print how long each part took.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the machine up: lock, build, restore or boot, set up."""
    box = sandbox(
        name,
        profile=profile,
        vcpus=cpus,
        memory=memory,
        backend=backend,
        env=_pairs(env, "--env"),
        env_from_host=tuple(env_from_host or ()),
    )
    if dry_run:
        _dry_run(box, as_json)
        return
    done = box.up(locked=locked, cold=cold)
    box.report.done()
    if timings:
        _print_timings(done)
    if as_json:
        print_json(_up_json(done))
    else:
        seconds = sum(done.phases.values())
        how = "is running" if done.how == "running" else f"is {done.how} ({done.accelerator}, {seconds:.1f} s)"
        print(f"`{done.name}` {how}: nixbox shell, nixbox run -- CMD", file=sys.stderr)
    failed = {"scripts": len(done.failed_scripts), "seeds": len(done.seeds.failed)}
    if any(failed.values()):
        words = " and ".join(f"{count} of its {what}" for what, count in failed.items() if count)
        raise NixboxError(f"the machine is up, but {words} failed")


def _up_json(done: Up) -> dict[str, object]:
    from nixbox.values import asdict

    return asdict(done) | {"image": str(done.image)}


def _print_timings(done: Up) -> None:
    """A bar for each part of a start, as long as its share."""
    total = sum(done.phases.values()) or 1.0
    for name, seconds in done.phases.items():
        print(f"{name:<10}{seconds * 1000:8.0f} ms  {'█' * round(40 * seconds / total)}", file=sys.stderr)
    print(f"{'total':<10}{total * 1000:8.0f} ms", file=sys.stderr)


def _dry_run(box: Sandbox, as_json: bool) -> None:
    from nixbox.config.settings import resolve_env
    from nixbox.image import ensure
    from nixbox.machine import accelerator
    from nixbox.values import asdict

    loaded = box.load()
    plan = box.plan(loaded)
    resolve_env(loaded.settings, os.environ)
    why = ensure.stale(box.workspace, plan.image)
    image = ensure.current(box.workspace, plan.image)
    choice = accelerator.choose(plan.machine.accelerator, plan.machine.backend)
    state = "running" if box.machine.alive() else "stopped" if box.machine.exists() else "new"
    if as_json:
        state_now = {"state": state, "chosen_accelerator": choice.accelerator}
        print_json(
            {
                "machine": asdict(plan.machine) | {"network": plan.machine.network.as_json()} | state_now,
                "image": asdict(plan.image) | {"built": str(image.path) if image else None, "relock": why},
            }
        )
        return
    spec = plan.machine
    print(f"machine      {spec.name} ({state})")
    print(f"lock         {'would be made: ' + why if why else 'fits the config'}")
    print(f"image        {image.path if image else 'would be built'}")
    print(f"backend      {spec.backend}")
    print(f"accelerator  {choice.accelerator}: {choice.reason}")
    print(f"resources    {spec.vcpus} vCPUs, {spec.memory_mib} MiB memory, {spec.disk_mib} MiB disk")
    print(f"env          {', '.join(spec.env_names) or '-'}")
    for mount in spec.mounts:
        print(f"mount        {mount.target} is {mount.source}{' (read-only)' if mount.readonly else ''}")
    for seed in spec.seeds:
        print(f"seed         {seed.target} from {seed.source}{'' if seed.on_up else ' (when asked)'}")
    for event, hooks in loaded.settings.hooks.items():
        for hook in hooks:
            print(f"hook         {event}, of {hook.whose}: {hook.first_line}")


def down(name: Name = None) -> None:
    """Stop the machine; its files stay."""
    box = sandbox(name)
    how = box.down()
    words = {"not running": "was not running", "powered off": "is down"}
    print(f"`{box.machine.name}` {words.get(how, f'is down ({how})')}", file=sys.stderr)


def shell(name: Name = None) -> None:
    """A login shell in the guest."""
    sandbox(name).shell()


def run_command(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, after `--`.")],
    machine: Machine = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds; then the command is ended and the code is 124.")
    ] = None,
    tty: Annotated[
        bool | None, typer.Option("--tty/--no-tty", help="Default: when stdin and stdout are one.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE for this command.")] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", "-w", help="Directory in the guest.")] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="On a fresh machine, which is gone afterwards.")
    ] = False,
) -> int:
    """Run a command in the guest: `nixbox run -- make test`. Exits with the command's own code."""
    try:
        pairs = dict(_pairs(env, "--env"))
        if ephemeral and machine is not None:
            raise ConfigError("--ephemeral makes a machine of its own; it does not go with --machine")
        box = _ephemeral() if ephemeral else sandbox(machine)
        want_tty = tty if tty is not None else sys.stdin.isatty() and sys.stdout.isatty()
        run = box.run_once if ephemeral else box.run
        code = run(command, tty=want_tty, timeout_s=timeout, env=pairs, workdir=workdir)
    except NixboxError as error:
        error.exit_code = ExitCode.RUN_FAILED
        raise
    if code == ExitCode.TIMEOUT and timeout is not None:
        print(f"error: the command was ended after {timeout:g} s", file=sys.stderr)
    return code


def _ephemeral() -> Sandbox:
    """A sandbox for one command, whose own output is the command's: nothing is said but what matters."""
    from nixbox.session import Sandbox, ephemeral

    return Sandbox.open(Path.cwd(), ephemeral.name(), reporter=reporter(quiet=True), ephemeral=True)


def suspend(name: Name = None) -> None:
    """Save the machine with its memory and stop it; `nixbox up` goes on from there."""
    box = sandbox(name)
    box.suspend()
    box.report.done()
    print(f"`{box.machine.name}` is suspended: nixbox up", file=sys.stderr)


def fork(
    name: Name = None,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", min=1, max=1000, help="How many.")] = 1,
    prefix: Annotated[
        str | None, typer.Option("--prefix", metavar="P", help="They are called P-1, P-2, …; default: NAME.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make machines that go on from a running one, from a stopped one's disk, or from the template."""
    box = sandbox(name)
    made = box.fork(count, prefix)
    box.report.done()
    if as_json:
        print_json([_up_json(up) for up in made])
    else:
        print("\n".join(up.name for up in made))


def status(name: Name = None, as_json: Json = False) -> int:
    """What the machine is doing. Exit code 4 when it is not running."""
    from nixbox import view

    box = sandbox(name)
    found = view.machine_view(box.machine)
    if as_json:
        print_json(found.as_dict())
    else:
        import time

        up_for = f" for {view.duration(int(time.time()) - found.started_at)}" if found.started_at else ""
        used = view.size(found.disk_used_bytes)
        print(f"machine      {found.name}: {found.state}{up_for}")
        print(f"image        {found.image}")
        print(f"backend      {found.backend} ({found.accelerator})")
        print(f"resources    {found.vcpus} vCPUs, {found.memory_mib} MiB memory")
        if found.memory is not None:
            resident, shared = view.size(found.memory.resident), view.size(found.memory.shared)
            print(f"memory       {resident} resident, {shared} of it shared")
        print(f"disk         {used} used of {found.disk_mib} MiB")
        print(f"network      {found.network}")
        for one in found.mounts:
            print(f"mount        {one}")
        if found.how:
            print(f"came up      {found.how}")
        for reason in found.snapshot:
            print(f"snapshot     not used: {reason}")
        if found.state == "io-error":
            print("hint: the host's disk is full; free some space, then `nixbox up`", file=sys.stderr)
    if found.state in ("stopped", "suspended"):
        return ExitCode.NOT_RUNNING
    return ExitCode.OK


def list_machines(as_json: Json = False) -> None:
    """The machines of this workspace."""
    from nixbox import paths, view
    from nixbox.machine.record import all_machines

    found = view.machine_views(all_machines(paths.find_workspace(Path.cwd())))
    if as_json:
        print_json([machine.as_dict() for machine in found])
        return
    rows = [
        [m.name, m.state, m.accelerator, str(m.vcpus), f"{m.memory_mib} MiB", view.size(m.disk_used_bytes)]
        for m in found
    ]
    if rows:
        view.print_rows(rows, ["NAME", "STATE", "ACCEL", "VCPUS", "MEMORY", "DISK USED"])
    else:
        print("no machines here: `nixbox up` makes one", file=sys.stderr)


def logs(
    name: Name = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the machine stops.")] = False,
    console: Annotated[bool, typer.Option("--console", help="The guest's serial console (the default).")] = False,
    setup: Annotated[bool, typer.Option("--setup", help="The output of the profile's setup.")] = False,
) -> None:
    """Show the guest's console, or its setup's output."""
    from nixbox import view

    if console and setup:
        raise ConfigError("--console and --setup are two logs; choose one")
    box = sandbox(name)
    box.machine.load()
    path = box.machine.setup_log if setup else box.machine.console_log
    if not path.exists():
        raise NixboxError(f"there is no such log yet: {path.relative_to(box.workspace)}")
    view.show_log(path, box.machine, follow=follow, out=sys.stdout)


def rm(
    name: Name = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the machine with its disk. Asks when the disk holds more than 100 MB."""
    from nixbox import view
    from nixbox.machine.overlay import allocated_bytes

    box = sandbox(name)
    if not box.machine.path.exists():
        box.machine.load()  # raises with the words for a machine that is not there
    used = allocated_bytes(box.machine.overlay) if box.machine.overlay.exists() else 0
    if used > 100_000_000 and not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"the disk of `{box.machine.name}` holds {view.size(used)}", hint="--yes removes it")
        import typer

        typer.confirm(f"the disk of `{box.machine.name}` holds {view.size(used)}; remove it?", abort=True, err=True)
    box.remove()
    print(f"`{box.machine.name}` is removed", file=sys.stderr)


def ssh_config(name: Name = None) -> None:
    """Print the machine's SSH configuration (for ssh -F, scp, …)."""
    print(sandbox(name).ssh_config().read_text(), end="")
