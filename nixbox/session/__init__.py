"""The story of a machine from config to guest: the one module that sees every stage, and the library's face."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from nixbox import paths, run
from nixbox.config import names
from nixbox.errors import NixboxError, NotRunningError
from nixbox.guest import ssh
from nixbox.machine.record import MachineDir, Record
from nixbox.programs import Programs
from nixbox.report import Phases, Reporter
from nixbox.session import finish, hooks, net, stop, which
from nixbox.session.outcome import Up
from nixbox.session.seeds import Asking
from nixbox.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from nixbox.config.settings import Loaded, Overrides
    from nixbox.guest.seed import Seeded
    from nixbox.image.build import Image, Means
    from nixbox.machine.accelerator import Choice
    from nixbox.machine.backend import Backend
    from nixbox.mounts.places import Place
    from nixbox.plan.model import Plan
    from nixbox.session.begin import Begun
    from nixbox.session.start import Start


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
        ephemeral: bool = False,
    ) -> None:
        self.workspace = workspace
        self.overrides = overrides
        self.report = reporter or Reporter()
        self.environ = os.environ if environ is None else environ
        self.machine = MachineDir(workspace, name or which.meant(workspace))
        self.ephemeral = ephemeral
        self.phase = Phases()
        self.programs = Programs()

    @classmethod
    def open(cls, start: Path, name: str | None = None, **options: object) -> Self:
        """The sandbox of the workspace at or above `start`; `name` selects another machine than the default."""
        checked = names.check_name(name, "machine name") if name is not None else None
        return cls(paths.find_workspace(start), checked, **options)  # type: ignore[arg-type]

    # --- plan and image ---

    def load(self, *, locked: bool = False) -> Loaded:
        """The merged, validated configuration; `locked` forbids new pins. Raises ConfigError with every fault."""
        from nixbox.loading import load

        return load(self.workspace, self.overrides, self.report, self.environ, locked=locked)

    def plan(self, loaded: Loaded | None = None) -> Plan:
        """What `up` would build and start. Raises ConfigError for what cannot be served."""
        from nixbox.machine import backends
        from nixbox.plan.resolve import resolve

        loaded = loaded or self.load()
        backend = backends.choose(loaded.settings.backend, loaded.settings.accelerator)
        return resolve(loaded, self.machine.name, backend)

    def lock(self) -> list[str]:
        """Resolve the package set anew; returns what changed."""
        from nixbox.image import ensure
        from nixbox.machine import backends

        loaded = self.load()
        mirror, security = loaded.settings.debian_mirror, loaded.settings.debian_security_mirror
        image = self.plan(loaded).image
        libkrun = backends.library(image)
        return ensure.relock(self.workspace, image, mirror, security, self.report, libkrun=libkrun)

    def build(self, *, locked: bool = False, loaded: Loaded | None = None, means: Means | None = None) -> Image:
        """The image, built if need be (`means`: or had elsewhere). Raises BuildError, GoneError, ConfigError."""
        from nixbox.image import ensure
        from nixbox.machine import backends

        loaded = loaded or self.load(locked=locked)
        mirror, security = loaded.settings.debian_mirror, loaded.settings.debian_security_mirror
        image = self.plan(loaded).image
        if loaded.unserved and ensure.stale(self.workspace, image):
            base = loaded.settings.base
            for origin, name in loaded.unserved:
                self.report.note(f"note: {origin} names {name} for another base only; an image of {base} lacks it")
        where, libkrun = (self.workspace, image, mirror, security, self.report), backends.library(image)
        return ensure.ensure(*where, locked=locked, libkrun=libkrun, means=means, phase=self.phase)

    # --- up ---

    def up(self, *, locked: bool = False, cold: bool = False) -> Up:
        """Bring the machine up, whatever state it is in; `cold` boots it, whatever is saved.

        A start that fails or is interrupted before the guest is ready leaves it down; its disk is whole either
        way. Raises HostError, ConfigError, BuildError, GuestError, and NixboxError for a setup that failed.
        """
        with nullcontext() if self.machine.alive() else self._programs_ahead():
            return self._whole_up(locked=locked, cold=cold)

    @contextmanager
    def _programs_ahead(self) -> Iterator[None]:
        """Have a process ready that a machine's guard is forked from: it imports while we do, and read the config."""
        with self.programs.waiting(f"nixbox-start-{self.machine.name}"):
            from nixbox.network import watch  # not before that process was begun

            self.programs.expect(watch.GUARD, watch.library())
            yield

    def _whole_up(self, *, locked: bool, cold: bool) -> Up:
        from nixbox.config.settings import resolve_env
        from nixbox.machine import backends

        with self.phase("config"):
            loaded = self.load(locked=locked)
            plan = self.plan(loaded)
            env = resolve_env(loaded.settings, self.environ)
        asking = self._ask(plan) if self.machine.alive() else None
        backends.named(plan.machine.backend).check_host()
        backends.named(plan.machine.backend).expect(self.programs)
        ssh.check_path(self.machine.ssh)
        places = self._look_at_mounts(plan)
        self._run_hooks("pre-up", loaded)
        done = self._up(plan, loaded, env, places, asking, locked=locked, cold=cold)
        self._run_hooks(
            "post-up", loaded, {"NIXBOX_HOW": done.how, "NIXBOX_SEEDS_PENDING": " ".join(done.seeds.pending)}
        )
        return done

    def _ask(self, plan: Plan) -> Asking:
        return Asking(self.machine, () if self.ephemeral else plan.machine.seeds)

    def _run_hooks(self, event: str, loaded: Loaded, also: Mapping[str, str] | None = None) -> None:
        """Outside of the busy lock: a hook may call nixbox for its own machine."""
        if not self.ephemeral:
            hooks.run_hooks(event, self.machine, loaded, self.environ, self.report, also)

    def _up(
        self,
        plan: Plan,
        loaded: Loaded,
        env: Mapping[str, str],
        places: list[Place],
        asking: Asking | None,
        *,
        locked: bool,
        cold: bool,
    ) -> Up:
        with self.busy():
            if self.machine.alive():
                running = self._running(plan, env, places, asking)
                if running is not None:
                    return running
            from nixbox.machine import accelerator
            from nixbox.session.begin import begin

            choice = accelerator.choose(plan.machine.accelerator, plan.machine.backend)
            image = self.build(locked=locked, loaded=loaded)
            with self.phase("prepare"):
                start = self._prepare(plan, image, choice, loaded, env, places)
            with ExitStack() as undo:
                undo.callback(self._abandon)
                with self.phase("network"):
                    undo.enter_context(start.network_ahead())
                with self._rooted(image):
                    begun = begin(start, plan, cold=cold)
                start.publish(begun.how, begun.setup)
                undo.pop_all()
            if begun.how == "resumed":
                self._remove_snapshot()  # it has gone on: what was saved is the past
            return self._finish(start, plan, begun)

    def _rooted(self, image: Image) -> AbstractContextManager[None]:
        """Keep the image from the garbage collector for as long as the machine is there."""
        from nixbox.image import store

        link = self.machine.image_root
        old = self.machine.load_or_none()
        known = old is not None and (old.image, old.workspace) == (str(image.path), str(self.workspace))
        if self.ephemeral or (known and link.is_symlink()):  # a workspace that was moved is rooted anew
            return nullcontext()
        return store.adding_root(link, image.path)

    def _remove_snapshot(self) -> None:
        from nixbox.machine import snapshot

        snapshot.remove(self.machine.snapshot)

    def busy(self) -> AbstractContextManager[None]:
        """Be the one command that changes the machine; another one is waited for, and that is said."""
        return self.machine.busy(self._waiting)

    def _waiting(self) -> None:
        self.report.note(f"another nixbox command is at work on `{self.machine.name}`; waiting for it")

    def _running(self, plan: Plan, env: Mapping[str, str], places: list[Place], asking: Asking | None) -> Up | None:
        """What to do about a live VM: go on with it, heal it, or (None) start over."""
        # A record that cannot be read raises: the machine may be in somebody's use, and is left alone.
        record = self.machine.load() if self.machine.exists() else None
        if record is None or not record.ready:
            self.report.note(f"`{self.machine.name}` was left half started; starting it again")
            stop.end(self.machine, self._backend())
            return None
        backend = self._backend()
        if backend.status(self.machine.sockets) == "io-error":
            self.report.note("the machine had stopped on a full host disk; letting it go on")
            backend.resume(self.machine.sockets)
        stop.heal(self.machine, backend)
        self._heal(record)
        self._tell_what_waits(plan, record, places)
        if record.env_hash != self._env_hash(record.machine_id, env):
            self._push(record, env)
        # The guest's own marker, not the record: a start may have been cut off between the two.
        done = finish.setup_done(self.machine) if plan.machine.setup is not None else None
        setup = finish.setup(self.machine, plan, done, self.report)
        asking = asking or self._ask(plan)
        seeded, failed = finish.user_part(self.machine, plan, self.phase, self.report, asking)
        phases = dict(self.phase.seconds)
        return Up(
            self.machine.name, "running", Path(record.image), record.accelerator, setup, failed, phases, seeds=seeded
        )

    def _look_at_mounts(self, plan: Plan) -> list[Place]:
        """What the config mounts; says where links lead. Raises ConfigError for what cannot be mounted."""
        from nixbox.session import mounts

        found = mounts.resolve(plan.machine.mounts, self.workspace)
        for place in found:
            if place.moved:
                self.report.note(f"{place.mount.target} is {place.source} ({place.mount.source} leads there)")
        return found

    def _heal(self, record: Record) -> None:
        """Start again what serves a running machine and has ended."""
        from nixbox.session import mounts

        if net.heal(self.machine, record, self.report):
            mounts.watch_again(self.machine, self._backend(), record)
        mounts.heal(self.machine, self._backend(), self.report)

    def mount(self, source: str, target: str, *, readonly: bool = False) -> Path:
        """Share a directory of the host with the running machine, now and at every later start.

        `source` is relative to the current directory; returns its real path. Raises NotRunningError, ConfigError.
        """
        from nixbox.session import mounts

        self.require_running()
        with self.busy():
            return mounts.mount(self.machine, self._backend(), source, target, readonly=readonly)

    def unmount(self, target: str, *, force: bool = False) -> bool:
        """Take a directory away from the running machine; whether it had one there.

        Raises NotRunningError, and GuestError when it is in use there and `force` is not set.
        """
        from nixbox.session import mounts

        self.require_running()
        with self.busy():
            return mounts.remove(self.machine, self._backend(), target, force=force) is not None

    def push_env(self) -> list[str]:
        """Give the running guest the config's variables as they are now; returns their names.

        New sessions have these and no others. Raises NotRunningError, and ConfigError for what the host lacks.
        """
        from nixbox.config.settings import resolve_env

        env = resolve_env(self.load().settings, self.environ)
        self.require_running()
        with self.busy():
            self._push(self.machine.load(), env)
        return sorted(env)

    def _push(self, record: Record, env: Mapping[str, str]) -> None:
        from nixbox.guest import control

        with control.Control.connect(self.machine.sockets.control) as channel:
            channel.push_env(env, stop.STOP_TIMEOUT_S)
        self.machine.update(env_hash=self._env_hash(record.machine_id, env))

    def _tell_what_waits(self, plan: Plan, record: Record, places: list[Place]) -> None:
        """A running machine keeps its image and shape; say so where the config has changed them."""
        from nixbox.image import ensure
        from nixbox.session import mounts

        spec = plan.machine
        changed = []
        shape = (spec.vcpus, spec.memory_mib, spec.return_memory)
        if (record.vcpus, record.memory_mib, record.return_memory) != shape:
            changed.append("resources")
        if record.backend != spec.backend:
            changed.append("backend")
        if record.network != spec.network.as_json():
            changed.append("network")
        if not mounts.follow(self.machine, self._backend(), places, self.report):
            changed.append("mounts")
        image = ensure.current(self.workspace, plan.image)
        if image is None or str(image.path) != record.image:
            changed.append("image")
        if changed:
            self.report.note(f"note: changed: {', '.join(changed)}; `nixbox down` and `nixbox up` put it into effect")

    def _prepare(
        self, plan: Plan, image: Image, choice: Choice, loaded: Loaded, env: Mapping[str, str], places: list[Place]
    ) -> Start:
        """Directories, keys and record: all that a start needs but the disk of a new machine."""
        from nixbox.session.prepare import prepare

        new = prepare(self.machine, plan, image, choice, places, self.report, ephemeral=self.ephemeral)
        new = replace(new, env_hash=self._env_hash(new.machine_id, env))
        return self._start(new, image, loaded, env)

    def _start(self, record: Record, image: Image, loaded: Loaded, env: Mapping[str, str]) -> Start:
        from nixbox.machine import backends
        from nixbox.network.watch import Watch
        from nixbox.session.start import Start

        return Start(
            machine=self.machine,
            record=record,
            image=image,
            backend=backends.named(record.backend),
            settings=loaded.settings,
            env=env,
            report=self.report,
            phase=self.phase,
            bound=self.ephemeral,
            watch=Watch(record.policy),
            programs=self.programs,
        )

    def _env_hash(self, machine_id: str, env: Mapping[str, str]) -> str:
        from nixbox.machine.snapshot import env_hash

        return env_hash(machine_id, env)

    def _finish(self, start: Start, plan: Plan, begun: Begun) -> Up:
        """The user's part of a start: the first-boot setup, then the scripts."""
        if begun.failure is not None:
            raise begun.failure
        with self.phase("setup"):
            done = None if begun.setup == "-" else begun.setup
            setup = finish.setup(self.machine, plan, done, self.report)
            if begun.made and begun.template == "ready" and setup == "done before":
                setup = "ran"
        seeded, failed = finish.user_part(self.machine, plan, self.phase, self.report, self._ask(plan))
        return Up(
            name=self.machine.name,
            how=begun.how,
            image=start.image.path,
            accelerator=start.record.accelerator,
            setup=setup,
            failed_scripts=failed,
            seeds=seeded,
            phases=dict(self.phase.seconds),
            template=begun.template,
            made=begun.made,
        )

    # --- down and rm ---

    def down(self) -> str:
        """Stop the machine: by its own init, else by the hypervisor, else by force; says which it took."""
        if not self.machine.path.exists():
            self.machine.load()  # raises with the words for a machine that is not there
        with self._down_hooks(), self.busy():
            return stop.stop(self.machine, self._backend())

    @contextmanager
    def _down_hooks(self) -> Iterator[None]:
        """Run the hooks around what ends a running machine; a config that cannot be read has none."""
        loaded = None
        if self.machine.alive() and not self.ephemeral:
            try:
                loaded = self.load()
            except NixboxError as error:
                self.report.note(f"note: no hooks are run: {error.message}")
        if loaded is not None:
            self._run_hooks("pre-down", loaded)
        yield
        if loaded is not None:
            self._run_hooks("post-down", loaded)

    def _abandon(self) -> None:
        self.report.done()
        stop.abandon(self.machine, self._backend())

    def remove(self) -> None:
        """Stop the machine and remove its overlay, keys, logs and record."""
        with self._down_hooks(), self.busy():
            # Under one lock: an `up` that is at work now is waited for, and its machine is stopped, not forgotten.
            if self.ephemeral:
                self._abandon()
            else:
                stop.stop(self.machine, self._backend())
            self.machine.remove()

    def seed(self, targets: Sequence[str] = (), *, force: bool = False) -> dict[str, Seeded]:
        """Copy the config's seeds, or those with these targets, to the running guest; what was done, by target.

        One that was finished before is not repeated unless `force`. Raises NotRunningError, ConfigError, NixboxError.
        """
        from nixbox.session import seeds

        self.require_running()
        return seeds.seed_now(self.machine, self.load().settings.seeds, targets, self.report, force=force)

    # --- suspend and fork ---

    def suspend(self) -> None:
        """Save the running machine with its memory and stop it; the next `up` goes on from there.

        Raises NotRunningError; after any other failure the machine runs on.
        """
        from nixbox.session import copies

        self.require_running()
        with self.busy():
            self.report.phase(f"saving `{self.machine.name}`")
            start = self._of_running(self.load(), {})
            copies.tell_what_it_needs(start, self.environ)
            copies.suspend(start)
            stop.end(self.machine, self._backend())

    def _of_running(self, loaded: Loaded, env: Mapping[str, str]) -> Start:
        """What a running machine was started with, whatever the config says by now. Under the busy lock."""
        from nixbox.image.build import Image
        from nixbox.session import copies

        if not self.machine.alive():
            raise NotRunningError(f"`{self.machine.name}` is not running", hint="`nixbox up` starts it")
        stop.heal(self.machine, self._backend())
        record = self.machine.load()
        copies.check_saves(record)
        image = Image(Path(record.image), self.machine.image_root, fresh=False)
        return self._start(record, image, loaded, env)

    def fork(self, count: int, prefix: str | None = None) -> list[Up]:
        """Make `count` machines that go on from this one: from its memory and disk if it runs, else from its disk.

        If there is no such machine they are new ones, from a template. They are named PREFIX-1, PREFIX-2, …, passing
        over names that are taken. Those that came up stay when one fails. Raises NixboxError.
        """
        from nixbox.session import copies, forks

        chosen = copies.claim_names(self.workspace, prefix or self.machine.name, count)
        boxes = [Sandbox(self.workspace, name, self.overrides, self.report, self.environ) for name in chosen]
        try:
            if self.machine.exists():
                with self.busy():
                    if self.machine.alive():
                        return self._fork_running(boxes)
                    forks.copy_disk(self.machine, boxes)
            return [box.up() for box in boxes]
        finally:
            for box in boxes:
                if not box.machine.exists() and not box.machine.alive():
                    box.machine.remove()  # it came to nothing

    def _fork_running(self, boxes: Sequence[Sandbox]) -> list[Up]:
        from nixbox.config.settings import resolve_env
        from nixbox.session import forks

        if not self.machine.load().ready:
            raise NotRunningError(f"`{self.machine.name}` is only half started", hint="`nixbox up` starts it anew")
        loaded = self.load()
        parent = self._of_running(loaded, resolve_env(loaded.settings, self.environ))
        stop.reached(self.machine)
        self.report.phase(f"copying `{self.machine.name}`")
        with self._programs_ahead():
            forks.fork_running(parent, boxes)
        path, accelerator = parent.image.path, parent.record.accelerator
        return [
            Up(box.machine.name, "forked", path, accelerator, "done before", phases=dict(box.phase.seconds))
            for box in boxes
        ]

    # --- inside ---

    def _backend(self) -> Backend:
        """The hypervisor that the machine runs on, or last ran on."""
        from nixbox.machine import backends

        record = self.machine.load_or_none()
        return backends.named(record.backend if record is not None else "qemu")

    def ssh_config(self) -> Path:
        """The SSH configuration for other programs. Raises NotRunningError when the machine is not up."""
        self.require_running()
        return self.machine.ssh / "config"

    def require_running(self) -> ssh.Endpoint:
        """How nixbox's own commands reach the guest. Raises NotRunningError when the machine is not up."""
        if not self.machine.alive():
            if not self.machine.exists():
                self.machine.load()  # raises with the words for a machine that is not there
            raise NotRunningError(f"`{self.machine.name}` is not running", hint="`nixbox up` starts it")
        if not self.machine.load().ready:
            if self.machine.is_busy():
                raise NotRunningError(f"`{self.machine.name}` is still starting", hint="wait for `nixbox up`")
            raise NotRunningError(
                f"`{self.machine.name}` is not running: its start was cut off", hint="`nixbox up` starts it anew"
            )
        if self.machine.paused.exists():
            with self.busy():
                stop.heal(self.machine, self._backend())
                self._heal(self.machine.load())
        return stop.reached(self.machine)

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
        run_id = os.urandom(8).hex()

        def forward(sig: signal.Signals) -> None:
            ssh.send_signal(endpoint, run_id, sig)

        line = ssh.remote_command(command, workdir)
        return run.attached(
            [*endpoint.argv("-tt" if tty else "-T"), ssh.marked(endpoint, run_id, line, env or {})],
            env={},
            timeout_s=timeout_s,
            forward=forward,
        )

    def run_once(
        self,
        command: Sequence[str],
        *,
        tty: bool = False,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
    ) -> int:
        """`run` on this machine, which is brought up for it and is gone afterwards. For an ephemeral sandbox.

        If this process is killed, the VM ends with it, and the next `run_once` removes what it left.
        """
        from nixbox.session import ephemeral

        ephemeral.sweep(self.workspace)
        try:
            self.up()
            return self.run(command, tty=tty, timeout_s=timeout_s, env=env, workdir=workdir)
        finally:
            self.remove()

    def shell(self) -> None:
        """Become a login shell in the guest."""
        run.replace([*self.require_running().argv("-t"), "/run/nixbox/session"])
