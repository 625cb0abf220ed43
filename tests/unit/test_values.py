"""Light values behave as dataclasses do, and the processes that stand beside a machine stay light."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest

import nixbox
from nixbox import values
from nixbox.values import asdict, dataclass, replace


@dataclass(frozen=True)
class Point:
    """Two numbers."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


@dataclass(frozen=True)
class Other:
    x: int
    y: int = 2


def test_fields_defaults_and_methods() -> None:
    assert (Point(1).x, Point(1).y, Point(1).sum, Point(y=5, x=4).sum) == (1, 2, 3, 9)
    assert asdict(Point(1)) == {"x": 1, "y": 2}
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
    assert replace(Point(1), y=9) == Point(1, 9)


def test_nothing_changes() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert point == Point(1)


def both(define: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """The same classes, made by dataclasses and by us."""
    return define(dataclasses.dataclass, dataclasses.field), define(values.dataclass, values.field)


def rich(dataclass: Any, field: Any) -> Any:
    @dataclass(frozen=True, slots=True)
    class Inner:
        n: int
        many: tuple[int, ...] = (1, 2)

    @dataclass(frozen=True, slots=True)
    class Base:
        """A base."""

        a: int
        kept: ClassVar[int] = 5

    @dataclass(frozen=True, slots=True)
    class Made(Base):
        b: dict[str, Any] = field(default_factory=dict)
        secret: str | None = field(default=None, repr=False)
        aside: int = field(default=0, compare=False)
        inner: Any = None

    @dataclass(slots=True)
    class Loose:
        x: int
        y: list[int] = field(default_factory=list)

    @dataclass(frozen=True)
    class Open:
        x: int
        y: int = 3

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("negative")

        @cached_property
        def sum(self) -> int:
            return self.x + self.y

        def __str__(self) -> str:
            return f"<{self.x}>"

    return Inner, Base, Made, Loose, Open


def attempt(act: Callable[[], Any]) -> Any:
    """What comes of it: the kind of an error, or what is shown."""
    try:
        return repr(act())
    except Exception as error:
        return type(error)


ACTS: list[Callable[..., Any]] = [
    lambda inner, base, made, loose, open: made(1),
    lambda inner, base, made, loose, open: made(1, {"x": 2}, "s", 4, inner(3)),
    lambda inner, base, made, loose, open: made(),
    lambda inner, base, made, loose, open: made(1, a=1),
    lambda inner, base, made, loose, open: made(1, z=1),
    lambda inner, base, made, loose, open: made(1, {}, "s", 4, 5, 6),
    lambda inner, base, made, loose, open: made(1).b is made(1).b,
    lambda inner, base, made, loose, open: made(1, aside=1) == made(1, aside=2),
    lambda inner, base, made, loose, open: made(1) == made(2),
    lambda inner, base, made, loose, open: made(1) == base(1),
    lambda inner, base, made, loose, open: hash(inner(1)) == hash(inner(1, (1, 2))),
    lambda inner, base, made, loose, open: hash(made(1)),
    lambda inner, base, made, loose, open: hash(loose(1)),
    lambda inner, base, made, loose, open: setattr(made(1), "a", 2),
    lambda inner, base, made, loose, open: delattr(open(1), "x"),
    lambda inner, base, made, loose, open: setattr(loose(1), "x", 2),
    lambda inner, base, made, loose, open: setattr(loose(1), "new", 2),
    lambda inner, base, made, loose, open: made(1).__dict__,
    lambda inner, base, made, loose, open: (made.kept, made.__match_args__, base.__doc__, made.__slots__),
    lambda inner, base, made, loose, open: (open(1).sum, str(open(2)), open.y),
    lambda inner, base, made, loose, open: open(-1),
    lambda inner, base, made, loose, open: copy.copy(made(1, {"x": [2]})),
    lambda inner, base, made, loose, open: copy.deepcopy(made(1, {"x": [2]}, inner=inner(3))),
    lambda inner, base, made, loose, open: [one.name for one in dataclasses.fields(made)],
    lambda inner, base, made, loose, open: dataclasses.replace(made(1), aside=7),
    lambda inner, base, made, loose, open: dataclasses.replace(open(1), x=-7),
    lambda inner, base, made, loose, open: dataclasses.asdict(made(1, {"k": [inner(4)]}, inner=inner(3))),
]


@pytest.mark.parametrize("act", ACTS)
def test_the_same_comes_of_it_as_of_a_dataclass(act: Callable[..., Any]) -> None:
    theirs, ours = both(rich)
    assert attempt(lambda: act(*theirs)) == attempt(lambda: act(*ours))


def test_functions_are_those_of_dataclasses() -> None:
    (inner, _, made, *_), (our_inner, _, ours, *_) = both(rich)
    given = {"b": {"k": [1, (2, Path("p"))]}, "aside": 3}
    one, other = made(1, **given, inner=[inner(4)]), ours(1, **given, inner=[our_inner(4)])
    assert values.asdict(other) == dataclasses.asdict(one) == values.asdict(one)
    assert values.asdict(other)["b"]["k"] is not other.b["k"]
    assert [field.name for field in values.fields(ours)] == [field.name for field in dataclasses.fields(made)]
    assert repr(values.replace(other, a=9)) == repr(dataclasses.replace(one, a=9))
    assert repr(values.replace(one, a=9)) == repr(dataclasses.replace(one, a=9))
    assert values.asdict(values.replace(other, inner=[inner(4)])) == dataclasses.asdict(one)  # theirs in ours
    with pytest.raises(TypeError):
        values.replace(other, z=1)


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
    large |= {"socket", "signal", "selectors", "threading", "contextlib", "enum", "collections", "functools"}
    assert not large & set(done.stdout.split())
