"""The config's seeds: which of them a machine still lacks, and their seeding."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

from nixbox.errors import ConfigError, NixboxError
from nixbox.session import stop
from nixbox.session.outcome import Seeds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.config.settings import Seed
    from nixbox.guest.seed import Seeded, Wanted
    from nixbox.guest.ssh import Endpoint
    from nixbox.machine.record import MachineDir
    from nixbox.report import Reporter


def _wanted(seed: Seed, workspace: Path) -> Wanted:
    from nixbox.guest.seed import Wanted

    try:
        source = workspace / Path(seed.source).expanduser()
    except RuntimeError:
        raise ConfigError(f"the seed's source `{seed.source}`: there is no such user") from None
    return Wanted(source, seed.target, seed.exclude, seed.sentinel)


class Asking:
    """Asks a guest which seeds it lacks, while something else is done: the answer takes a tenth of a second.

    It may be asked before the machine is known to be well, so this begins no connection: without one, or when it
    fails, it is asked again at `answer`. And before anybody else is kept from changing the machine: the engine looks
    again at what is lacking.
    """

    def __init__(self, machine: MachineDir, seeds: Sequence[Seed]) -> None:
        self.machine = machine
        self.seeds = seeds
        self._wanted = [_wanted(seed, machine.workspace) for seed in seeds]
        self._found: list[bool] | None = None
        self._thread = threading.Thread(target=self._try, daemon=True)
        if seeds:
            self._thread.start()

    def _try(self) -> None:
        if self.machine.ssh_sockets[1].exists():
            with contextlib.suppress(NixboxError):
                self._found = self._ask(stop.endpoint(self.machine))

    def _ask(self, endpoint: Endpoint) -> list[bool]:
        from nixbox.guest import seed as engine

        return engine.pending(endpoint, self._wanted)

    def answer(self) -> list[bool]:
        """Of each seed whether it is lacking. Raises NixboxError when the guest does not answer."""
        if self.seeds:
            self._thread.join()
        return self._ask(stop.reached(self.machine)) if self._found is None else self._found


def on_up(asking: Asking, report: Reporter) -> Seeds:
    """Seed what `up` seeds and the machine lacks.

    A failure is told, and the next one goes on; one whose source this host has not got yet waits for it.
    """
    if not asking.seeds:
        return Seeds()
    from nixbox.guest import seed as engine

    machine, lacking = asking.machine, asking.answer()
    endpoint = stop.reached(machine)
    seeded, failed, pending = [], [], []
    for seed, lacks in zip(asking.seeds, lacking, strict=True):
        if not lacks:
            continue
        if not seed.on_up:
            pending.append(seed.target)
            continue
        wanted = _wanted(seed, machine.workspace)
        if not wanted.source.exists():
            report.note(f"note: {seed.target} is not seeded: this host has no {seed.source} yet")
            pending.append(seed.target)
            continue
        try:
            engine.seed(endpoint, wanted, report=report)
            seeded.append(seed.target)
        except NixboxError as error:
            report.note(f"warning: {seed.target} was not seeded: {error.message}")
            failed.append(seed.target)
            pending.append(seed.target)
    return Seeds(tuple(seeded), tuple(failed), tuple(pending))


def seed_now(
    machine: MachineDir, seeds: Sequence[Seed], targets: Sequence[str], report: Reporter, *, force: bool
) -> dict[str, Seeded]:
    """Seed the config's seeds, or those with these targets; returns what was done, by target. Raises NixboxError."""
    from nixbox.config.fields import near
    from nixbox.guest import seed as engine

    known = {seed.target: seed for seed in seeds}
    unknown = [target for target in targets if target not in known]
    if unknown:
        faults = [f"no seed has the target `{target}`{near(target, known)}" for target in unknown]
        raise ConfigError(
            "not every seed is known",
            hint="`nixbox config` shows them: [[seeds]] of config.toml and plugins",
            faults=faults,
        )
    endpoint = stop.reached(machine)
    done = {}
    for target in targets or known:
        done[target] = engine.seed(endpoint, _wanted(known[target], machine.workspace), force=force, report=report)
    return done
