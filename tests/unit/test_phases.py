"""The timeline of a start."""

from __future__ import annotations

import time

import pytest

from nixbox.report import Phases


def test_a_part_inside_another_counts_for_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    phase = Phases()
    with phase("outer"):
        now += 1
        with phase("inner"):
            now += 10
            with phase("innermost"):
                now += 100
        now += 2
    with phase("inner"), pytest.raises(ValueError, match="stop"), phase("failed"):
        now += 5
        raise ValueError("stop")
    assert phase.seconds == {"outer": 3.0, "inner": 10.0, "innermost": 100.0, "failed": 5.0}
    assert list(phase.seconds) == ["outer", "inner", "innermost", "failed"]
    assert sum(phase.seconds.values()) == now - 100
