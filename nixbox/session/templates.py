"""Find or make the template that a machine starts from. A guest is built, saved and ended; machines are restored.

Stage `boot`: the kernel is up, no disk has been looked at; for every machine that has a disk already. Stage `ready`:
made from `boot` with a pristine disk, the profile's setup done, the SSH server waiting for its key; for new machines.
"""

from __future__ import annotations

from collections.abc import Callable

from nixbox import run, sparse
from nixbox.digests import sha256
from nixbox.errors import NixboxError
from nixbox.guest import ssh
from nixbox.machine import overlay, saved, template
from nixbox.machine.backend import MemoryFile
from nixbox.machine.record import MachineDir, new_machine_id
from nixbox.network.watch import Watch
from nixbox.plan.network import Policy
from nixbox.programs import Programs
from nixbox.report import Phases
from nixbox.session import stop
from nixbox.session.start import Restored, Start
from nixbox.values import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from nixbox.guest.control import Control
    from nixbox.machine.template import Key, Stage, Template
    from nixbox.plan.model import Plan
    from nixbox.report import Reporter

_HOLD_TIMEOUT_S = 60.0
# Read once, so that the first session of a machine finds in memory what it needs.
_WARM = "cat /usr/sbin/sshd /usr/lib/openssh/sshd-* >/dev/null 2>&1; sudo -n true; bash -lc true; true"


@dataclass(frozen=True, slots=True)
class Found:
    """A template to start from; `made` says that it was made just now, `failure` that its setup failed."""

    template: Template
    made: bool = False
    failure: NixboxError | None = None


class Templates:
    """The templates for one machine's image and shape. `start` describes that machine."""

    def __init__(self, start: Start, plan: Plan, limit_bytes: int) -> None:
        self.start = start
        self.plan = plan
        self.limit_bytes = limit_bytes

    def key(self, stage: Stage) -> Key:
        """What a template of this stage must have been made of."""
        from nixbox.guest.setup import setup_hash

        start, record, spec = self.start, self.start.record, self.plan.machine
        shared = spec.setup is not None and not spec.setup_env
        ready = stage == "ready"
        return template.Key(
            stage=stage,
            image=record.image,
            backend=record.backend,
            hypervisor=start.backend.version(),
            accelerator=record.accelerator,
            cpu=template.host_cpu(record.accelerator),
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            root=", ".join(map(_identity, (start.image.file("root.img"), *start.image.sidecars))),
            devices=tuple(start.backend.shape(start.spec())),
            user=record.user if ready else None,
            setup=setup_hash(spec.setup) if ready and shared and spec.setup is not None else None,
            disk_mib=spec.disk_mib if ready else None,
            files=sha256(repr(sorted(start.files().items())).encode()).hexdigest() if ready else None,
        )

    def get(self, stage: Stage) -> Found:
        """Find the template, or make it. Raises NixboxError when that fails."""
        key, report = self.key(stage), self.start.report
        found = template.find(key, report.note)
        if found is not None:
            return Found(found)

        def waiting() -> None:
            report.note("another nixbox command is making the template; waiting for it")

        with template.making(key, waiting) as work:
            found = template.find(key, report.note)
            if found is not None:
                return Found(found)
            with self.start.phase("template"):
                return self._make_boot(key, work) if stage == "boot" else self._make_ready(key, work)

    def _builder(self, work: Path, key: Key, policy: Policy | None) -> Start:
        """A guest of nobody's: throw-away keys, no environment, and it ends when we do."""
        machine = MachineDir(work, key.ident[:12], work / "vm")
        machine.prepare()
        record = replace(
            self.start.record,
            name="nixbox",
            machine_id=new_machine_id(),
            pid=None,
            ready=False,
            setup=None,
            ephemeral=True,
            mounts=[],
            shares_memory=False,
        )
        machine.save(record)
        return replace(
            self.start,
            machine=machine,
            record=record,
            devices_of=self.start.record,
            env={},
            settings=self.start.settings,
            phase=Phases(),
            bound=True,
            watch=Watch(policy),
            programs=Programs(),
            ahead=[],
        )

    def _make_boot(self, key: Key, work: Path) -> Found:
        builder = self._builder(work, key, None)
        self.start.report.phase(f"making a template: booting ({key.accelerator})")
        out = _new_directory(work / "out")
        with builder.machine.overlay.open("wb") as disk:  # nobody looks at it but for its size
            disk.truncate(builder.record.disk_mib << 20)
        try:
            builder.boot(MemoryFile(out / "memory", shared=True)).close()
            self._save(builder, out)
        finally:
            stop.end(builder.machine, builder.backend)
        return self._publish(out, key)

    def _make_ready(self, key: Key, work: Path) -> Found:
        boot = self.get("boot").template
        try:
            # Only a setup may reach anything; nixbox's own sessions may need a network that leads nowhere.
            builder = self._builder(work, key, self.start.watch.policy if key.setup is not None else Policy("off"))
            out = _new_directory(work / "out")
            with saved.create(out / "memory") as memory:
                sparse.copy_data(boot.memory, memory.fileno())
            overlay.create(builder.machine.overlay, self.plan.machine.disk_mib)
            try:
                with builder.restore(MemoryFile(out / "memory", shared=True), boot.state) as restored:
                    channel = restored.channel
                    failure = self._furnish(builder, restored, key)
                    # Whoever restores it takes this connection's place: dropbear waits at its end of it.
                    with ssh.connected(builder.machine.sockets.shell):
                        self._hold(channel)
                        self._save(builder, out)
            finally:
                stop.end(builder.machine, builder.backend)
        finally:
            boot.close()
        builder.machine.overlay.rename(out / "overlay.img")
        if builder.machine.setup_log.exists():
            builder.machine.setup_log.rename(out / "setup.log")
        if failure is not None:
            # Not a template, but what the user's machine goes on from: with what the setup has left, to look around.
            return Found(template.open_files(out, key, published=False), made=True, failure=failure)
        return self._publish(out, key)

    def _furnish(self, builder: Start, restored: Restored, key: Key) -> NixboxError | None:
        """Bring the guest to `ready` and run the setup; returns the setup's failure."""
        self.start.report.phase("making a template: starting the guest")
        restored.tell("boot")
        restored.ready()
        builder.watch.settle()
        endpoint = stop.reached(builder.machine)
        run.run([*endpoint.argv("-T"), _WARM], timeout_s=_HOLD_TIMEOUT_S, check=False)
        failure = None
        if key.setup is not None:
            assert self.plan.machine.setup is not None
            failure = run_setup(builder.machine, builder.report, self.plan.machine.setup)
            if failure is not None and self.plan.machine.env_names:
                failure.hint = (
                    f"it is shared, so it sees no env unless the profile says setup_env = true; {failure.hint}"
                )
            if failure is None:
                restored.channel.setup_done(key.setup, _HOLD_TIMEOUT_S)
        ssh.close_masters(endpoint, builder.machine.ssh_sockets)
        return failure

    def _hold(self, channel: Control) -> None:
        self.start.report.phase("making a template: saving")
        channel.send("hold")
        channel.expect("held", _HOLD_TIMEOUT_S)

    def _save(self, builder: Start, out: Path) -> None:
        sockets = builder.machine.sockets
        with self.start.phase("save"):
            builder.backend.pause(sockets)
            state = builder.backend.save(sockets, MemoryFile(out / "memory", shared=True))
            with saved.create(out / "state") as file:
                file.write(state)

    def _publish(self, out: Path, key: Key) -> Found:
        with self.start.phase("save"):
            template.publish(out, key)
        found = template.find(key, self.start.report.note)
        if found is None:
            raise NixboxError("the template that was just made is gone", hint="try again, or use `nixbox up --cold`")
        collect(self.limit_bytes, self.start.report.note, keep=key.ident)
        return Found(found, made=True)


def run_setup(machine: MachineDir, report: Reporter, text: str) -> NixboxError | None:
    """Run the profile's setup in a guest; returns its failure, which is not raised."""
    from nixbox.guest import control, setup

    report.phase("running the profile's setup (once)")
    log, endpoint = machine.setup_log, stop.endpoint(machine)
    code = setup.run_script(endpoint, "setup", text, log, report.output)
    if code == 0:
        return None
    lines = "".join(f"\n  {line}" for line in control.tail(log, 15))
    return NixboxError(
        f"the profile's setup failed with exit code {code}{setup.interpreter_note(text, code)}; "
        f"it will run again at the next up:{lines}",
        hint="the machine is up, look around with `nixbox shell`; the log: nixbox logs --setup",
    )


def collect(limit_bytes: int, say: Callable[[str], None], keep: str | None = None) -> None:
    """Remove templates beyond the limit."""
    for info in template.over_limit(template.every(), limit_bytes, keep):
        template.remove(template.directory() / info.ident)
        say(f"removed a template that was not used for long ({info.size_bytes >> 20} MiB)")


def _identity(path: Path) -> str:
    info = path.stat()
    return f"{info.st_ino} {info.st_size} {info.st_ctime_ns}"


def _new_directory(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path
