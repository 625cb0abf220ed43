"""The KVM probe, many times: which classes it finds, and how long it takes. `python -m bench.probe RUNS`.

Each run is a child that opens the device, makes a VM and a vCPU and times a loop, as nixbox's own child does. That
one's interpreter is left out: it is the same for all runs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter

from nixbox.machine import kvm


def once(calls: kvm._Calls, device: str) -> str:
    """The class that a child finds: a VM lives as long as its process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        os.write(writing, kvm.classify(kvm._try_kvm(calls, fd), device)[0].value.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read().decode()
    os.waitpid(child, 0)
    return found


def runs(count: int, device: str = "/dev/kvm") -> dict[str, object]:
    """How often each class was found, and the times in ms."""
    calls = kvm._Calls()
    found: Counter[str] = Counter()
    times = []
    for _ in range(count):
        begun = time.monotonic()
        found[once(calls, device)] += 1
        times.append((time.monotonic() - begun) * 1e3)
    return {"classes": dict(found), "median_ms": round(statistics.median(times), 2), "max_ms": round(max(times), 2)}


if __name__ == "__main__":
    print(json.dumps(runs(int(sys.argv[1]))))
