"""Which hypervisor a machine gets: the one that is asked for, else the best that is there."""

from __future__ import annotations

import contextlib

from nixbox import run
from nixbox.config.cache import krun_library
from nixbox.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from nixbox.machine.backend import Backend
    from nixbox.plan.model import BackendName, ImageSpec


def choose(
    wanted: Literal["auto", "qemu", "krun", "cloud-hypervisor"], accelerator: Literal["auto", "kvm", "hvf", "tcg"]
) -> BackendName:
    """`auto` is QEMU where it is installed: a restore is quicker than any boot. Else libkrun, if that works here.

    Where neither does, it is QEMU all the same, which says what to install.
    """
    if wanted != "auto":
        return wanted
    if accelerator != "tcg" and run.find_tool("qemu-system-x86_64") is None and _krun_works():
        return "krun"
    return "qemu"


def _krun_works() -> bool:
    from nixbox.machine import accelerator, libkrun

    try:
        libkrun.find(krun_library())
        accelerator.choose("auto", "krun")
    except HostError:
        return False
    return True


def library(image: ImageSpec) -> Path | None:
    """The libkrun beside which an image's kernel for it is looked for; None when it needs none or there is none."""
    if not image.krun:
        return None
    from nixbox.machine import libkrun

    with contextlib.suppress(HostError):
        return libkrun.find(krun_library())
    return None


def named(name: str) -> Backend:
    """The backend of that name."""
    if name == "krun":
        from nixbox.machine.krun import Krun

        return Krun(krun_library())
    if name == "cloud-hypervisor":
        from nixbox.machine.cloud_hypervisor import CloudHypervisor

        return CloudHypervisor()
    from nixbox.machine.qemu import Qemu

    return Qemu()
