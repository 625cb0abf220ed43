"""The user's own part of a start: the profile's setup, once, then the scripts and the published ports."""

from __future__ import annotations

from nixbox import run
from nixbox.errors import NixboxError
from nixbox.session import stop
from nixbox.session.outcome import Seeds
from nixbox.session.seeds import Asking, on_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.machine.record import MachineDir
    from nixbox.plan.model import Plan
    from nixbox.report import Phases, Reporter


def setup(machine: MachineDir, plan: Plan, done: str | None, report: Reporter) -> str:
    """Run the profile's setup unless one ran before. Raises NixboxError when it fails; the next up retries."""
    text = plan.machine.setup
    if text is None:
        return "none"
    from nixbox.guest import control
    from nixbox.guest.setup import setup_hash
    from nixbox.session.templates import run_setup

    wanted = setup_hash(text)
    if done is not None:
        if done != wanted:
            report.note(
                "note: the profile's setup has changed; it ran before and is not run again on this machine "
                f"(`nixbox rm {machine.name}` and `nixbox up` start a fresh one)"
            )
        return "done before"
    stop.reached(machine)
    failure = run_setup(machine, report, text)
    if failure is not None:
        raise failure
    with control.Control.connect(machine.sockets.control) as channel:
        channel.setup_done(wanted, stop.STOP_TIMEOUT_S)
    machine.update(setup=wanted)
    return "ran"


def setup_done(machine: MachineDir) -> str | None:
    """The hash of the setup that ran in the running guest."""
    said = run.run(
        [*stop.reached(machine).argv("-T"), "cat /var/lib/nixbox/setup-done 2>/dev/null || :"], timeout_s=60
    )
    return said.stdout.strip() or None


def scripts(machine: MachineDir, plan: Plan, report: Reporter) -> tuple[str, ...]:
    """Run every script in order; a failure is shown and the next one runs."""
    failed = []
    for number, script in enumerate(plan.machine.scripts, 1):
        from nixbox.guest import setup

        title = f"script {number} of {script.origin}"
        report.phase(f"running {title}")
        code = setup.run_script(stop.reached(machine), title, script.text, None, report.output)
        if code != 0:
            report.note(f"warning: {title} failed with exit code {code}")
            failed.append(title)
    return tuple(failed)


def user_part(
    machine: MachineDir, plan: Plan, phase: Phases, report: Reporter, asking: Asking
) -> tuple[Seeds, tuple[str, ...]]:
    """Ports, seeds and scripts: what became of the seeds, and which scripts failed."""
    publish_ports(machine, plan, report)
    with phase("seeds"):
        seeded = on_up(asking, report)
    with phase("scripts"):
        failed = scripts(machine, plan, report)
    return seeded, failed


def publish_ports(machine: MachineDir, plan: Plan, report: Reporter) -> None:
    """Those of the config, and those that were added to the machine before."""
    from nixbox.session import ports

    for published in ports.wanted(machine, plan.machine.published):
        try:
            ports.publish(machine, published)
        except NixboxError as error:
            report.note(f"note: {error.message}")
