"""Frozen values without `dataclasses`, for the processes that stand beside a machine and that its start waits for.

`dataclasses` brings `inspect`, `ast` and `tokenize`, which take longer to import than Python itself takes to start;
`typing` is for those who check types. See docs/decisions/028-light-processes.md.
"""

from __future__ import annotations

__all__ = ["as_dict", "changed", "value"]

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from dataclasses import dataclass as value
    from typing import Any, TypeVar

    V = TypeVar("V")
else:

    def value(*, frozen):
        """A class decorator: fields and defaults as in a dataclass; equal when all fields are. Always `frozen`."""
        assert frozen

        def made(cls):
            names = tuple(cls.__annotations__)
            defaults = {name: cls.__dict__[name] for name in names if name in cls.__dict__}

            def __init__(self, *positional, **named):
                given = dict(zip(names, positional, strict=False))
                fields = defaults | given | named
                if len(positional) > len(names) or given.keys() & named.keys() or fields.keys() != set(names):
                    raise TypeError(f"{cls.__name__} takes {', '.join(names)}; not {positional} and {named}")
                self.__dict__.update((name, fields[name]) for name in names)

            def __eq__(self, other):
                return self.__dict__ == other.__dict__ if other.__class__ is cls else NotImplemented

            def __hash__(self):
                return hash(tuple(self.__dict__.values()))

            def __repr__(self):
                return f"{cls.__name__}({', '.join(f'{name}={field!r}' for name, field in self.__dict__.items())})"

            def __setattr__(self, name, _=None):
                raise AttributeError(f"{cls.__name__}.{name} does not change")

            for method in (__init__, __eq__, __hash__, __repr__, __setattr__):
                setattr(cls, method.__name__, method)
            cls.__delattr__ = __setattr__
            cls.__match_args__ = names
            return cls

        return made


def as_dict(one: object) -> dict[str, Any]:
    """The fields of a value, by name."""
    return dict(vars(one))


def changed(one: V, **fields: Any) -> V:
    """A value with other fields."""
    return type(one)(**(vars(one) | fields))
