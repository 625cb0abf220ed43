"""Values without the cost of `dataclasses`, for what every start imports and for the processes beside a machine.

`dataclasses` brings `inspect`, `ast` and `tokenize`, which take longer to import than Python itself takes to start,
and compiles some six functions for each class, of which a start imports fifty; `typing` is for those who check types,
who see dataclasses. What is made by the thousand is better off as one of the library's, which are made faster.
See docs/decisions/028-light-processes.md and 036-light-values.md.
"""

from __future__ import annotations

__all__ = ["asdict", "dataclass", "field", "fields", "replace"]

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, fields, replace
else:
    _MISSING = object()
    _PLAIN = frozenset((str, int, float, bool, bytes, type(None)))

    class _Field:
        """One field of a class: what it is without a value, and which methods leave it out."""

        __slots__ = ("compare", "default", "default_factory", "name", "repr", "type")

        def __init__(self, default, default_factory, repr, compare):
            self.default, self.default_factory, self.repr, self.compare = default, default_factory, repr, compare

    class _Fields:
        """`__dataclass_fields__` for those who ask: the library's functions then take a value for one of theirs."""

        def __get__(self, _, cls):
            import dataclasses

            def real(one):
                given = {
                    name: getattr(one, name)
                    for name in ("default", "default_factory")
                    if getattr(one, name) is not _MISSING
                }
                return one.name, one.type, dataclasses.field(**given, repr=one.repr, compare=one.compare)

            made = dataclasses.make_dataclass(cls.__name__, map(real, cls.__value_fields__.values()), kw_only=True)
            return made.__dataclass_fields__

    def field(*, default=_MISSING, default_factory=_MISSING, repr=True, compare=True):
        """As dataclasses.field."""
        return _Field(default, default_factory, repr, compare)

    def dataclass(*, frozen=False, slots=False):
        """As dataclasses.dataclass: fields, defaults, methods; equal when of one class and all fields are."""

        def made(cls):
            inherited = {}
            for base in reversed(cls.__mro__[1:]):
                inherited |= base.__dict__.get("__value_fields__", {})
            own = {}
            for name, annotation in cls.__annotations__.items():
                if annotation.partition("[")[0] in ("ClassVar", "typing.ClassVar"):
                    continue
                default = cls.__dict__.get(name, _MISSING)
                one = default if isinstance(default, _Field) else _Field(default, _MISSING, True, True)
                one.name, one.type = name, annotation
                own[name] = one
                if name in cls.__dict__ and (slots or one.default is _MISSING):
                    delattr(cls, name)
                elif one.default is not _MISSING:
                    setattr(cls, name, one.default)
            table = inherited | own
            if slots:
                cls = _slotted(cls, tuple(own), frozen=frozen)
            cls.__value_fields__ = table
            cls.__dataclass_fields__ = _Fields()
            _give_methods(cls, table, frozen=frozen)
            return cls

        return made

    def _slotted(cls, names, *, frozen):
        """The class anew: slots are laid out when a class is made."""
        body = {name: of for name, of in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
        body["__slots__"] = names
        made = type(cls)(cls.__name__, cls.__bases__, body)
        made.__qualname__ = cls.__qualname__
        if frozen:  # copies are filled in by what such a class refuses

            def __getstate__(self):
                return [getattr(self, name) for name in self.__value_fields__]

            def __setstate__(self, state):
                for name, of in zip(self.__value_fields__, state, strict=True):
                    object.__setattr__(self, name, of)

            made.__getstate__, made.__setstate__ = __getstate__, __setstate__
        return made

    def _give_methods(cls, table, *, frozen):
        names = tuple(table)
        compared = tuple(name for name, one in table.items() if one.compare)
        shown = tuple(name for name, one in table.items() if one.repr)
        write = object.__setattr__
        begun = hasattr(cls, "__post_init__")

        def __init__(self, *positional, **named):
            given = dict(zip(names, positional, strict=False))
            if len(positional) > len(names) or given.keys() & named.keys() or not named.keys() <= table.keys():
                raise TypeError(f"{cls.__name__} takes {', '.join(names)}; not {len(positional)} and {[*named]}")
            given |= named
            for name, one in table.items():
                if name in given:
                    write(self, name, given[name])
                elif one.default_factory is not _MISSING:
                    write(self, name, one.default_factory())
                elif one.default is not _MISSING:
                    write(self, name, one.default)
                else:
                    raise TypeError(f"{cls.__name__} takes {', '.join(names)}; `{name}` is missing")
            if begun:
                self.__post_init__()

        def __eq__(self, other):
            if other.__class__ is not self.__class__:
                return NotImplemented
            return all(getattr(self, name) == getattr(other, name) for name in compared)

        def __hash__(self):
            return hash(tuple(getattr(self, name) for name in compared))

        def __repr__(self):
            return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

        def __setattr__(self, name, *_):
            from dataclasses import FrozenInstanceError

            raise FrozenInstanceError(f"{cls.__name__}.{name} does not change")

        for method in (__init__, __repr__, __eq__, *((__setattr__,) if frozen else ())):
            if method.__name__ not in cls.__dict__:
                setattr(cls, method.__name__, method)
        if frozen:
            cls.__delattr__ = __setattr__
        cls.__hash__ = __hash__ if frozen else None  # what changes is no key
        cls.__match_args__ = names

    def fields(one):
        """The fields of a value or of its class; each has a `name`."""
        return tuple(one.__value_fields__.values())

    def replace(one, **changes):
        """A value with other fields, as dataclasses.replace."""
        if not hasattr(type(one), "__value_fields__"):  # one of the library's
            from dataclasses import replace as real

            return real(one, **changes)
        return one.__class__(**({name: getattr(one, name) for name in one.__value_fields__} | changes))

    def asdict(one):
        """The fields of a value by name, and those of values in it, as dataclasses.asdict."""
        if not hasattr(type(one), "__value_fields__"):  # one of the library's
            from dataclasses import asdict as real

            return real(one)
        return {name: _plain(getattr(one, name)) for name in one.__value_fields__}

    def _plain(one):
        if type(one) in _PLAIN:
            return one
        if hasattr(type(one), "__value_fields__") or hasattr(type(one), "__dataclass_fields__"):
            return asdict(one)
        if isinstance(one, tuple) and hasattr(one, "_fields"):
            return type(one)(*map(_plain, one))
        if isinstance(one, (list, tuple)):
            return type(one)(map(_plain, one))
        if isinstance(one, dict):
            return type(one)((_plain(key), _plain(of)) for key, of in one.items())
        if hasattr(one, "__fspath__"):  # a path does not change
            return one
        from copy import deepcopy

        return deepcopy(one)
