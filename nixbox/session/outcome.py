"""What `up` did, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nixbox.values import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.session.begin import How


@dataclass(frozen=True, slots=True)
class Seeds:
    """What became of seeds (their targets): those seeded just now, those that failed, those still to be seeded."""

    seeded: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Up:
    """What `up` did.

    `how`: it was `running`, or was `booted`, `restored` from a template, `resumed` from its own saved state, or
    `forked` from another machine. `template` is the stage that it was restored from (`ready` for a new machine,
    `boot` for one with a disk), `made` whether that template was made just now. `seeds` is what became of the seeds
    of the config. `phases` maps names to seconds.
    """

    name: str
    how: How
    image: Path
    accelerator: str
    setup: str
    failed_scripts: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    template: str | None = None
    made: bool = False
    seeds: Seeds = field(default_factory=Seeds)
