"""Light values behave as dataclasses do, and the processes that stand beside a machine stay light."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

import nixbox
from nixbox.values import as_dict, changed, value


@value(frozen=True)
class Point:
    """Two numbers."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


@value(frozen=True)
class Other:
    x: int
    y: int = 2


def test_fields_defaults_and_methods() -> None:
    assert (Point(1).x, Point(1).y, Point(1).sum, Point(y=5, x=4).sum) == (1, 2, 3, 9)
    assert as_dict(Point(1)) == {"x": 1, "y": 2}
    assert repr(Point(1, 3)) == "Point(x=1, y=3)"
    assert Point.__doc__ == "Two numbers."
    match Point(7, 8):
        case Point(x, y):
            assert (x, y) == (7, 8)


@pytest.mark.parametrize(("positional", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"z": 1})])
def test_wrong_fields_are_refused(positional: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point takes x, y"):
        Point(*positional, **named)


def test_equal_when_all_is() -> None:
    assert Point(1) == Point(1, 2) != Point(2)
    other: object = Other(1)
    assert Point(1) != other
    assert {Point(1), Point(1, 2), Point(3)} == {Point(1), Point(3)}
    assert copy.deepcopy(Point(1)) == Point(1)
    assert changed(Point(1), y=9) == Point(1, 9)


def test_nothing_changes() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert point == Point(1)


@pytest.mark.parametrize("module", ["nixbox.network.guard", "nixbox.machine.krun_child", "nixbox.forkserver"])
def test_a_process_beside_a_machine_imports_little(module: str) -> None:
    root = Path(nixbox.__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    large = {
        "dataclasses",
        "inspect",
        "typing",
        "platform",
        "pydantic",
        "cffi",
        "json",
        "pathlib",
        "re",
        "subprocess",
    }
    assert not large & set(done.stdout.split())
