"""The KVM probe, many times: which classes it finds, and how long it takes. `python -m bench.probe RUNS`.

Each run is the probe's work on a device: opening it, a VM, a vCPU, a timed loop. That of the child in which nixbox
does this, and of its interpreter, is left out: it is the same for all runs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter

from nixbox.machine import kvm


def runs(count: int, device: str = "/dev/kvm") -> dict[str, object]:
    """How often each class was found, and the times in ms."""
    calls = kvm._Calls()
    found: Counter[str] = Counter()
    times = []
    for _ in range(count):
        begun = time.monotonic()
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            state, _, _ = kvm.classify(kvm._try_kvm(calls, fd), device)
        finally:
            os.close(fd)
        found[state.value] += 1
        times.append((time.monotonic() - begun) * 1e3)
    return {"classes": dict(found), "median_ms": round(statistics.median(times), 2), "max_ms": round(max(times), 2)}


if __name__ == "__main__":
    print(json.dumps(runs(int(sys.argv[1]))))
