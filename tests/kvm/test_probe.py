"""The KVM probe where KVM runs guests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.kvm.box import Box

CHECKOUT = Path(__file__).resolve().parents[2]
_PROBE = """
import json, sys, time
from nixbox.machine import kvm
found = []
for _ in range(int(sys.argv[1])):
    begun = time.monotonic()
    probe = kvm.probe()
    found.append([probe.state.value, probe.reason, (time.monotonic() - begun) * 1000])
print(json.dumps(found))
"""


def test_a_kvm_that_runs_guests_is_usable(box: Box) -> None:
    done = box.run([sys.executable, "-c", _PROBE, "20"], cwd=str(CHECKOUT))
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {state for state, _, _ in found} == {"usable"}, found
    print("slowest probe:", max(ms for _, _, ms in found), "ms")
