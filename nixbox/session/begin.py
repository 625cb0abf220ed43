"""From what a machine starts: its own saved state, a template, or nothing; whatever is there and fastest."""

from __future__ import annotations

from pathlib import Path

from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.machine import overlay
from nixbox.session import stop
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from nixbox.machine.template import Stage
    from nixbox.plan.model import Plan
    from nixbox.session.start import Start
    from nixbox.session.templates import Found

    How = Literal["running", "booted", "restored", "resumed", "forked"]
else:  # without what `typing` costs
    How = str


@dataclass(frozen=True, slots=True)
class Begun:
    """A guest that has said `ready`: how it came to that, and the hash of the setup that ran there (`-`: none).

    `template` is the stage that it was restored from, `made` whether that template was made just now, and `failure`
    that the setup failed on the way.
    """

    how: How
    setup: str
    template: str | None = None
    made: bool = False
    failure: NixboxError | None = None


def begin(start: Start, plan: Plan, *, cold: bool) -> Begun:
    """Start the VM the fastest way that there is, up to `ready`; `cold` boots it, whatever is saved."""
    begun = None
    if start.machine.overlay.exists():  # a damaged disk is no fault of a template's, nor a reason to make one
        start.backend.check(start.spec())
    if not cold:
        begun = _resume(start)
        if begun is None and start.backend.features.templates:
            begun = _restore(start, plan)
    if begun is None:
        begun = _boot(start, plan)
    if begun.how != "resumed" and start.machine.snapshot.exists():
        _forget_snapshot(start, "the machine was started without it")
    return begun


def _resume(start: Start) -> Begun | None:
    """From the machine's own saved state; None when there is none that may be used."""
    machine, report = start.machine, start.report
    if not machine.snapshot.exists():
        return None
    from nixbox.machine import snapshot
    from nixbox.session import copies

    why = copies.resumable(start)
    if why is None:
        return None
    if why:
        report.note(f"not resumed: {'; '.join(why)}")
        return None
    report.phase(f"resuming `{machine.name}`")
    machine.save(start.record)
    try:
        with copies.resume(start) as restored, start.phase("go"):
            restored.tell("resume")
            done = restored.ready(lenient=True)
    except NixboxError as error:
        stop.abandon(machine, start.backend)
        if snapshot.went_on(machine.snapshot):
            report.note(f"not resumed: {error.message}")
            machine.prepare()
            _forget_snapshot(start, "it was restored and did not answer")
            return None
        # It never ran: what hinders it may pass, and its memory may be somebody's work.
        raise NixboxError(
            f"`{machine.name}` could not be resumed: {error.message}",
            hint="what was saved is still there: try again, or start it from its disk with `nixbox up --cold`",
        ) from None
    return Begun("resumed", done)


def _forget_snapshot(start: Start, why: str) -> None:
    """A snapshot that the machine has gone on without is of no use; its manifest says why."""
    from nixbox.machine import snapshot

    kept = snapshot.read(start.machine.snapshot)
    if kept is not None and not kept.invalidateReasons:
        snapshot.invalidate(start.machine.snapshot, kept, [why])


def _restore(start: Start, plan: Plan) -> Begun | None:
    """From a template, which is made if there is none; None when that does not work."""
    machine, report = start.machine, start.report
    stage: Stage = "boot" if machine.overlay.exists() else "ready"
    try:
        with start.phase("find"):
            from nixbox.config.cache import template_limit_bytes
            from nixbox.machine import saved, template
            from nixbox.session.templates import Templates

            found = Templates(start, plan, template_limit_bytes()).get(stage)
    except ConfigError:  # no boot would do better
        raise
    except (NixboxError, OSError) as error:  # a cache that cannot be written, for one
        report.note(f"no template could be made, so the machine boots: {error}")
        return None
    made = found.template
    try:
        if made.overlay is not None:
            with start.phase("disk"):
                saved.copy(Path(f"/proc/self/fd/{made.overlay}"), machine.overlay)
            if made.setup_log:
                machine.setup_log.write_text(made.setup_log)
        report.phase(f"restoring `{machine.name}` from a template ({start.record.accelerator})")
        machine.save(start.record)
        return _from_template(start, found, stage)
    except (ConfigError, HostError):  # no fault of the template's
        raise
    except NixboxError as error:
        if made.path is None or not machine.overlay.exists():  # nothing to boot with, or no disk could be made
            raise
        report.note(f"the template does not work, so it is removed and the machine boots: {error.message}")
        stop.abandon(machine, start.backend)
        machine.prepare()
        template.remove(made.path)
        return None
    finally:
        made.close()


def _from_template(start: Start, found: Found, stage: Literal["boot", "ready"]) -> Begun:
    made = found.template
    held = stage == "ready"
    with start.restore_from(made.memory, made.state, held=held) as restored, start.phase("go"):
        restored.tell("hold" if held else "boot")
        done = restored.ready()
    return Begun("restored", done, stage, found.made, found.failure)


def _boot(start: Start, plan: Plan) -> Begun:
    """From nothing."""
    machine = start.machine
    if not machine.overlay.exists():
        with start.phase("disk"):
            overlay.create(machine.overlay, plan.machine.disk_mib)
    machine.save(start.record)
    start.report.phase(f"booting `{machine.name}` ({start.record.accelerator})")
    with start.boot() as channel:
        done = start.identify(channel)
        start.connect()
    return Begun("booted", done)
