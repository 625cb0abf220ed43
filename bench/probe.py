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
from dataclasses import asdict

from nixbox.machine import kvm


def once(calls: kvm._Calls, device: str) -> str:
    """The class that is found; each VM lives as long as a child."""

    def measure(fd: int) -> kvm.Measurement | str:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(asdict(kvm._try_kvm(calls, fd))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return kvm.Measurement(**json.loads(said)) if said else "it failed"

    return kvm.probe(device, measure=measure).state.value


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
