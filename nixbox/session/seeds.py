"""The config's seeds: which of them a machine still lacks, and their seeding."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nixbox.errors import ConfigError, NixboxError
from nixbox.session import stop
from nixbox.session.outcome import Seeds

if TYPE_CHECKING:
    from nixbox.config.settings import Seed
    from nixbox.guest.seed import Seeded, Wanted
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
    """Asks a guest which seeds it lacks, while something else is done: the answer takes a tenth of a second."""

    def __init__(self, machine: MachineDir, seeds: Sequence[Seed]) -> None:
        self._found: list[bool] = []
        self._failure: NixboxError | None = None
        self._thread: threading.Thread | None = None
        if seeds:
            wanted = [_wanted(seed, machine.workspace) for seed in seeds]
            self._thread = threading.Thread(target=self._ask, args=(machine, wanted), daemon=True)
            self._thread.start()

    def _ask(self, machine: MachineDir, wanted: Sequence[Wanted]) -> None:
        from nixbox.guest import seed as engine

        try:
            self._found = engine.pending(stop.reached(machine), wanted)
        except NixboxError as error:
            self._failure = error

    def answer(self) -> list[bool]:
        """Of each seed whether it is lacking. Raises NixboxError when the guest does not answer."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._found


def on_up(machine: MachineDir, seeds: Sequence[Seed], report: Reporter, asking: Asking | None = None) -> Seeds:
    """Seed what `up` seeds and the machine lacks; `asking` is the question about these seeds, if it was asked before.

    A failure is told, and the next one goes on; one whose source this host has not got yet waits for it.
    """
    if not seeds:
        return Seeds()
    from nixbox.guest import seed as engine

    lacking = (asking or Asking(machine, seeds)).answer()
    endpoint = stop.reached(machine)
    seeded, failed, pending = [], [], []
    for seed, lacks in zip(seeds, lacking, strict=True):
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
