"""Which accelerator a machine gets, and why: KVM if a probe shows that it runs guests, else HVF, else TCG."""

from __future__ import annotations

import sys

from nixbox import paths
from nixbox.errors import HostError
from nixbox.machine.kvm import KvmState, cached_probe
from nixbox.plan.model import Accelerator, BackendName
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator, the reason in words, and what would make it faster (None: nothing)."""

    accelerator: Accelerator
    reason: str
    hint: str | None = None


def choose(wanted: Literal["auto", "kvm", "hvf", "tcg"], backend: BackendName = "qemu") -> Choice:
    """Choose for this host, and a backend. Raises HostError when what is asked for cannot work here."""
    if wanted == "tcg":
        return Choice("tcg", "the config asks for software emulation")
    if sys.platform == "darwin":  # not run on the machines that this was written on
        if wanted == "kvm":
            raise HostError("macOS has no KVM", hint='machine.accelerator = "auto" uses its own hypervisor')
        return Choice("hvf", "macOS's own hypervisor")
    if wanted == "hvf":
        raise HostError("only macOS has this hypervisor", hint='use machine.accelerator = "auto"')
    probe = cached_probe(paths.cache_dir())
    if probe.state is KvmState.USABLE:
        return Choice("kvm", probe.reason)
    if backend != "qemu":
        hint = "; ".join(filter(None, (probe.hint, "`--backend qemu` runs without KVM, more slowly")))
        raise HostError(f"the backend {backend} needs KVM, which cannot be used: {probe.reason}", hint=hint)
    if wanted == "kvm":
        raise HostError(f"KVM cannot be used: {probe.reason}", hint=probe.hint)
    return Choice("tcg", f"software emulation, since KVM cannot be used: {probe.reason}", probe.hint)
