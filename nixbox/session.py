"""The story of a machine from config to guest: the one module that sees every stage, and the library's face."""

from __future__ import annotations

import os
import secrets
import signal
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nixbox import paths, run
from nixbox.config import names
from nixbox.errors import ConfigError, NixboxError, NotRunningError
from nixbox.guest import control, ssh
from nixbox.machine.record import MachineDir, Record
from nixbox.report import Reporter

if TYPE_CHECKING:
    from nixbox.config.load import Loaded, Overrides
    from nixbox.image.build import Image
    from nixbox.machine.accelerator import Choice
    from nixbox.machine.backend import Backend
    from nixbox.plan.model import Plan

# A guest under software emulation on a busy host may take a minute; a bound, not an expectation.
BOOT_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Up:
    """What `up` did: `how` is `booted` or `running` (it was up already); phases in seconds."""

    name: str
    how: str
    image: Path
    accelerator: str
    setup: str
    failed_scripts: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)


class Sandbox:
    """One machine of one workspace; every method leaves a state from which every other works.

    >>> box = Sandbox.open(Path("."))
    >>> box.up()
    >>> box.run(["make", "test"])
    """

    def __init__(
        self,
        workspace: Path,
        name: str | None = None,
        overrides: Overrides | None = None,
        reporter: Reporter | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.workspace = workspace
        self.overrides = overrides
        self.report = reporter or Reporter()
        self.environ = os.environ if environ is None else environ
        self.machine = MachineDir(workspace, name or default_machine(workspace))
        self._phases: dict[str, float] = {}

    @classmethod
    def open(cls, start: Path, name: str | None = None, **options: object) -> Self:
        """The sandbox of the workspace at or above `start`; `name` selects another machine than the default."""
        checked = names.check_name(name, "machine name") if name is not None else None
        return cls(paths.find_workspace(start), checked, **options)  # type: ignore[arg-type]

    # --- plan and image ---

    def load(self) -> Loaded:
        """The merged, validated configuration. Raises ConfigError with every fault."""
        from nixbox.config.load import load

        return load(self.workspace, self.overrides)

    def plan(self, loaded: Loaded | None = None) -> Plan:
        """What `up` would build and start. Raises ConfigError for what cannot be served."""
        from nixbox.plan.resolve import resolve

        return resolve(loaded or self.load(), self.machine.name)

    def lock(self) -> list[str]:
        """Resolve the package set anew; returns what changed."""
        from nixbox.image import ensure

        loaded = self.load()
        mirror, security = loaded.settings.debian_mirror, loaded.settings.debian_security_mirror
        return ensure.relock(self.workspace, self.plan(loaded).image, mirror, security, self.report)

    def build(self, *, locked: bool = False, loaded: Loaded | None = None) -> Image:
        """The image, built if need be. Raises BuildError, GoneError, ConfigError."""
        from nixbox.image import ensure

        loaded = loaded or self.load()
        mirror, security = loaded.settings.debian_mirror, loaded.settings.debian_security_mirror
        image = self.plan(loaded).image
        return ensure.ensure(self.workspace, image, mirror, security, self.report, locked=locked)

    # --- up ---

    def up(self, *, locked: bool = False) -> Up:
        """Bring the machine up, whatever state it is in.

        A start that fails or is interrupted before the guest is ready leaves it down; its disk is whole either
        way. Raises HostError, ConfigError, BuildError, GuestError, and NixboxError for a setup that failed.
        """
        from nixbox.config.load import resolve_env
        from nixbox.machine import accelerator

        with self._phase("config"):
            loaded = self.load()
            plan = self.plan(loaded)
            env = resolve_env(loaded.settings, self.environ)
        self._backend().check_host()
        ssh.check_path(self.machine.ssh)
        for notice in plan.notices:
            self.report.note(f"note: {notice}")
        with self.machine.busy(self._waiting):
            if self.machine.alive():
                running = self._running(plan, env)
                if running is not None:
                    return running
            with self._phase("image"):
                image = self.build(locked=locked, loaded=loaded)
            with self._phase("prepare"):
                choice = accelerator.choose(plan.machine.accelerator)
                record = self._prepare(plan, image, choice)
            with ExitStack() as undo:
                undo.callback(self._abandon)
                guest_setup = self._boot(record, image, env, loaded)
                undo.pop_all()
            return self._finish(plan, image, choice, guest_setup)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._phases[name] = round(time.monotonic() - start, 4)

    def _waiting(self) -> None:
        self.report.note(f"another nixbox command is at work on `{self.machine.name}`; waiting for it")

    def _running(self, plan: Plan, env: Mapping[str, str]) -> Up | None:
        """What to do about a live VM: go on with it, heal it, or (None) start over."""
        # A record that cannot be read raises: the machine may be in somebody's use, and is left alone.
        record = self.machine.load() if self.machine.exists() else None
        if record is None or not record.ready or record.ssh_port is None:
            self.report.note(f"`{self.machine.name}` was left half started; starting it again")
            self._end()
            return None
        qemu = self._backend()
        if qemu.status(self.machine.sockets) == "io-error":
            self.report.note("the machine had stopped on a full host disk; letting it go on")
            qemu.resume(self.machine.sockets)
        self._tell_what_waits(plan, record)
        with control.Control.connect(self.machine.sockets.control) as channel:
            channel.push_env(env, STOP_TIMEOUT_S)
        # The guest's own marker, not the record: a start may have been cut off between the two.
        setup = self._setup(plan, self._setup_done() if plan.machine.setup is not None else None)
        failed = self._scripts(plan)
        return Up(self.machine.name, "running", Path(record.image), record.accelerator, setup, failed)

    def _tell_what_waits(self, plan: Plan, record: Record) -> None:
        """A running machine keeps its image and shape; say so where the config has changed them."""
        from nixbox.image import ensure

        spec = plan.machine
        changed = []
        if (record.vcpus, record.memory_mib) != (spec.vcpus, spec.memory_mib):
            changed.append("resources")
        image = ensure.current(self.workspace, plan.image)
        if image is None or str(image.path) != record.image:
            changed.append("image")
        if changed:
            self.report.note(f"note: changed: {', '.join(changed)}; `nixbox down` and `nixbox up` put it into effect")

    def _setup_done(self) -> str | None:
        """The hash of the setup that ran in the running guest."""
        said = run.run([*self._endpoint().argv("-T"), "cat /var/lib/nixbox/setup-done"], timeout_s=60, check=False)
        return said.stdout.strip() or None

    def _prepare(self, plan: Plan, image: Image, choice: Choice) -> Record:
        """Directories, record, keys and overlay disk; the record is written when all else is there."""
        from nixbox.image import store
        from nixbox.machine import overlay, record

        machine, spec = self.machine, plan.machine
        old = machine.load() if machine.exists() else None
        machine.prepare()
        if old is None and machine.overlay.exists():
            # Its record is missing, but an overlay may hold somebody's work: it is never thrown away here.
            self.report.note("found an overlay disk without a record; keeping it")
        if not machine.overlay.exists():
            overlay.create(machine.overlay, spec.disk_mib)
        disk_mib = overlay.size_mib(machine.overlay)
        if spec.disk_mib > disk_mib:
            overlay.grow(machine.overlay, spec.disk_mib)
        elif spec.disk_mib < disk_mib and old is not None:
            self.report.note(f"note: the overlay disk stays at {disk_mib} MiB; a disk is never shrunk")
        ssh.make_keys(machine.ssh)
        if old is not None and old.image != str(image.path):
            self.report.note("the image has changed: the machine's own files stay on top of the new one")
        where = str(self.workspace)
        if (
            old is None
            or (old.image, old.workspace) != (str(image.path), where)
            or not machine.image_root.is_symlink()
        ):
            store.add_root(machine.image_root, image.path)  # a workspace that was moved is rooted anew
        new = record.Record(
            name=machine.name,
            machine_id=old.machine_id if old else record.new_machine_id(),
            user=old.user if old else ssh.guest_user(),
            created_at=old.created_at if old else int(time.time()),
            image=str(image.path),
            backend="qemu",
            accelerator=choice.accelerator,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            disk_mib=max(spec.disk_mib, disk_mib),
            workspace=where,
        )
        machine.save(new)
        return new

    def _boot(self, record: Record, image: Image, env: Mapping[str, str], loaded: Loaded) -> str:
        """Start the VM and see it to `ready`; returns the hash of the setup that ran in it before, or `-`."""
        from nixbox.machine.backend import VmSpec

        machine, qemu = self.machine, self._backend()
        spec = VmSpec(
            name=machine.name,
            kernel=image.file("vmlinux"),
            initrd=image.file("initrd"),
            root=image.file("root.squashfs"),
            overlay=machine.overlay,
            console_log=machine.console_log,
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            accelerator=record.accelerator,  # type: ignore[arg-type]
        )
        self.report.phase(f"booting `{machine.name}` ({record.accelerator})")
        machine.rotate_logs()
        with machine.hold_lock() as lock_fd:
            pid = qemu.start(spec, machine.sockets, lock_fd, machine.vm_log)
        machine.update(pid=pid, started_at=int(time.time()))
        try:
            with control.Control.connect(machine.sockets.control) as channel:
                with self._phase("boot"):
                    version = channel.expect("boot", BOOT_TIMEOUT_S)
                    if version != control.PROTOCOL:
                        raise control.GuestError(f"the image speaks control protocol {version}; rebuild it")
                    channel.go(self._go(record, env, loaded))
                with self._phase("guest"):
                    done = channel.expect("ready", BOOT_TIMEOUT_S)
        except control.GuestError as error:
            raise self._explained(error) from None
        with self._phase("ssh"):
            port = qemu.ssh_port(machine.sockets)
            endpoint = ssh.write_config(machine.ssh, machine.name, record.user, port, machine.ssh_control)
            ssh.open_master(endpoint)
        machine.update(ready=True, ssh_port=port, setup=None if done == "-" else done)
        return done

    def _go(self, record: Record, env: Mapping[str, str], loaded: Loaded) -> control.Go:
        from nixbox.image import apt
        from nixbox.machine import overlay, qemu_args

        settings = loaded.settings
        files = {}
        try:
            mirrors = apt.mirrors(settings.debian_mirror, settings.debian_security_mirror)
            files["etc/apt/sources.list.d/nixbox.sources"] = apt.guest_sources(mirrors, settings.suite)
        except ConfigError:
            # An image that was built elsewhere runs on a host that knows no mirror; its apt has none then.
            self.report.note("note: no Debian mirror is known here, so apt in the guest has no package sources")
        return control.Go(
            hostname=record.name,
            user=record.user,
            image=record.image,
            grow=overlay.filesystem_mib(self.machine.overlay) < overlay.size_mib(self.machine.overlay),
            machine_id=record.machine_id,
            time_s=int(time.time()),
            address=qemu_args.GUEST_ADDRESS,
            gateway=qemu_args.GUEST_GATEWAY,
            dns=qemu_args.GUEST_DNS,
            host_key=(self.machine.ssh / "host_key").read_bytes(),
            authorized_key=(self.machine.ssh / "user_key.pub").read_bytes(),
            env=env,
            files=files,
        )

    def _explained(self, error: NixboxError) -> NixboxError:
        """A guest that ended is explained by the end of its console and of the hypervisor's own output."""
        lines = control.tail(self.machine.vm_log, 5) + control.tail(self.machine.console_log, 15)
        body = "".join(f"\n  {line}" for line in lines)
        return NixboxError(error.message + body, hint=f"the whole log: nixbox logs {self.machine.name} --console")

    def _finish(self, plan: Plan, image: Image, choice: Choice, guest_setup: str) -> Up:
        """The user's part of a start: the first-boot setup, then the scripts."""
        with self._phase("setup"):
            setup = self._setup(plan, None if guest_setup == "-" else guest_setup)
        with self._phase("scripts"):
            failed = self._scripts(plan)
        return Up(
            name=self.machine.name,
            how="booted",
            image=image.path,
            accelerator=choice.accelerator,
            setup=setup,
            failed_scripts=failed,
            phases=dict(self._phases),
        )

    def _setup(self, plan: Plan, done: str | None) -> str:
        """Run the profile's setup unless one ran before. Raises NixboxError when it fails; the next up retries."""
        text = plan.machine.setup
        if text is None:
            return "none"
        from nixbox.guest import setup

        wanted = setup.setup_hash(text)
        if done is not None:
            if done != wanted:
                self.report.note(
                    "note: the profile's setup has changed; it ran before and is not run again on this machine "
                    f"(`nixbox rm {self.machine.name}` and `nixbox up` start a fresh one)"
                )
            return "done before"
        self.report.phase("running the profile's setup (once)")
        endpoint, log = self._endpoint(), self.machine.setup_log
        code = setup.run_script(endpoint, "setup", text, log, self.report.output)
        if code != 0:
            lines = "".join(f"\n  {line}" for line in control.tail(log, 15))
            raise NixboxError(
                f"the profile's setup failed with exit code {code}{setup.interpreter_note(text, code)}; "
                f"it will run again at the next up:{lines}",
                hint=f"the machine is up, look around with `nixbox shell {self.machine.name}`; "
                "the log: nixbox logs --setup",
            )
        with control.Control.connect(self.machine.sockets.control) as channel:
            channel.send(f"setup-done {wanted}")
            channel.expect("ready", STOP_TIMEOUT_S)
        self.machine.update(setup=wanted)
        return "ran"

    def _scripts(self, plan: Plan) -> tuple[str, ...]:
        """Run every script in order; a failure is shown and the next one runs."""
        failed = []
        for number, script in enumerate(plan.machine.scripts, 1):
            from nixbox.guest import setup

            title = f"script {number} of {script.origin}"
            self.report.phase(f"running {title}")
            code = setup.run_script(self._endpoint(), title, script.text, None, self.report.output)
            if code != 0:
                self.report.note(f"warning: {title} failed with exit code {code}")
                failed.append(title)
        return tuple(failed)

    # --- down and rm ---

    def down(self) -> str:
        """Stop the machine: by its own init, else by the hypervisor, else by force; says which it took."""
        if not self.machine.path.exists():
            self.machine.load()  # raises with the words for a machine that is not there
        with self.machine.busy(self._waiting):
            return self._stop()

    def _stop(self) -> str:
        """`down` for who holds the busy lock already."""
        if not self.machine.alive():
            self.machine.clean_runtime()
            return "not running"
        record = self.machine.load_or_none()
        if record is None or not record.ready:
            return self._end()
        if not self._power_off():
            self._sync()
            return self._end()
        self.machine.clean_runtime()
        return "powered off"

    def _power_off(self) -> bool:
        """Ask the guest's init to sync and power off; whether it did within the bound."""
        try:
            if self._backend().status(self.machine.sockets) != "running":
                return False
            with control.Control.connect(self.machine.sockets.control) as channel:
                channel.send("poweroff")
                channel.expect("off", STOP_TIMEOUT_S)
        except NixboxError:
            # An older message, a hung guest, a closed socket: the harder ways follow.
            return self.machine.wait_gone(0.5)
        return self.machine.wait_gone(KILL_TIMEOUT_S)

    def _sync(self) -> None:
        """The guest's init did not answer: what was written there should reach its disk all the same."""
        try:
            if self._backend().status(self.machine.sockets) == "running":
                run.run([*self._endpoint().argv(), "sync"], timeout_s=STOP_TIMEOUT_S, check=False)
        except NixboxError:
            return

    def _end(self) -> str:
        """End a VM without asking the guest: QMP quit, then SIGKILL."""
        how = "quit"
        ssh.close_master(self._endpoint(), self.machine.ssh_control)
        try:
            self._backend().quit(self.machine.sockets)
        except NixboxError:
            how = "killed"
        if how == "killed" or not self.machine.wait_gone(KILL_TIMEOUT_S):
            how = "killed"
            if not self.machine.kill(signal.SIGKILL, KILL_TIMEOUT_S):
                raise NixboxError(f"the VM process of `{self.machine.name}` cannot be ended")
        self.machine.clean_runtime()
        return how

    def _abandon(self) -> None:
        """A start that failed or was interrupted leaves no VM behind."""
        self.report.done()
        if self.machine.alive():
            self._end()
        self.machine.clean_runtime()

    def remove(self) -> None:
        """Stop the machine and remove its overlay, keys, logs and record."""
        with self.machine.busy(self._waiting):
            # Under one lock: an `up` that is at work now is waited for, and its machine is stopped, not forgotten.
            self._stop()
            self.machine.remove()

    # --- inside ---

    def _backend(self) -> Backend:
        from nixbox.machine.qemu import Qemu

        return Qemu()

    def _endpoint(self) -> ssh.Endpoint:
        return ssh.Endpoint(self.machine.ssh / "config", self.machine.name)

    def require_running(self) -> ssh.Endpoint:
        """The SSH endpoint. Raises NotRunningError when the machine is not up."""
        if not self.machine.alive():
            if not self.machine.exists():
                self.machine.load()  # raises with the words for a machine that is not there
            raise NotRunningError(f"`{self.machine.name}` is not running", hint="`nixbox up` starts it")
        if not self.machine.load().ready:
            raise NotRunningError(f"`{self.machine.name}` is still starting", hint="wait for `nixbox up`")
        return self._endpoint()

    def run(
        self,
        command: Sequence[str],
        *,
        tty: bool = False,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
    ) -> int:
        """Run a command in the guest on our own standard streams; returns its exit code.

        Signals that reach us are sent to it. Raises NotRunningError when the machine is not up.
        """
        endpoint = self.require_running()
        run_id = secrets.token_hex(8)

        def forward(sig: signal.Signals) -> None:
            ssh.send_signal(endpoint, run_id, sig)

        return run.attached(
            [*endpoint.argv("-tt" if tty else "-T"), ssh.remote_command(command, workdir)],
            env=ssh.session_env(run_id, env or {}),
            timeout_s=timeout_s,
            forward=forward,
        )

    def shell(self) -> None:
        """Become a login shell in the guest."""
        run.replace(self.require_running().argv("-t"))


def default_machine(workspace: Path) -> str:
    """The name of a workspace's default machine, without reading more of the config than that.

    A config that cannot be read or names something impossible is loaded in full, which raises ConfigError.
    """
    file = workspace / paths.CONFIG_DIR / paths.CONFIG_FILE
    try:
        name = tomllib.loads(file.read_text(encoding="utf-8")).get("name", names.default_name(workspace))
    except (OSError, ValueError):
        name = None
    if isinstance(name, str) and names.is_name(name):
        return name
    from nixbox.config.load import load

    return load(workspace).settings.name
