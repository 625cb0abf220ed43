"""The KVM probe where KVM runs guests; where it does not, tests/unit and tests/vm have it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.kvm.box import Box

CHECKOUT = Path(__file__).resolve().parents[2]
_PROBE = "from nixbox.machine import kvm; found = kvm.probe(); print(found.state.value, found.reason)"


def test_a_kvm_that_runs_guests_is_usable(box: Box) -> None:
    done = box.run([sys.executable, "-c", _PROBE], cwd=str(CHECKOUT))
    assert done.code == 0 and done.stdout.startswith("usable /dev/kvm runs guest code natively"), done
    done = box.run([sys.executable, "-m", "bench.probe", "50"], cwd=str(CHECKOUT))
    print(done.stdout)
    assert json.loads(done.stdout)["classes"] == {"usable": 50}, done
