"""Base classes of `tensorrt_fakes`: enums and objects that behave like pybind11's."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


class FakeType(type):
    _label = "TensorRT"
    _spec: dict[str, Any] | None = None

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"{cls._label} has no {cls.__qualname__}.{name}")


@functools.total_ordering
class FakeEnum(metaclass=FakeType):
    """An enum like pybind11's: a member is not an int, and the class can be neither iterated nor subscripted."""

    name: str
    value: int
    _ordered = False
    __members__: dict[str, "FakeEnum"] = {}  # noqa: RUF012

    def __new__(cls, value: int) -> "FakeEnum":
        for member in cls.__members__.values():
            if member.value == int(value):
                return member
        raise ValueError(f"{cls._label} has no {cls.__qualname__} of value {value}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self)._label}: {self!r} is constant")

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeEnum) and type(self) is type(other) and self.value == other.value

    def __lt__(self, other: object) -> bool:
        if self._ordered and isinstance(other, FakeEnum) and type(self) is type(other):
            return self.value < other.value
        return NotImplemented

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


class FakeObjectType(FakeType):
    """Checks the classes that the code under test derives from TensorRT's interfaces."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        if "_spec" not in namespace:
            for key, value in namespace.items():
                if inspect.isfunction(value) and not key.startswith("_"):
                    cls._check_override(key, value)

    def _check_override(cls, name: str, method: Callable[..., Any]) -> None:
        specs = [base._spec for base in cls.__mro__ if isinstance(base, FakeType) and base._spec]
        documented = [spec["overrides"][name] for spec in specs if name in spec["overrides"]]
        bound = [spec["methods"][name]["overloads"] for spec in specs if name in spec["methods"]]
        if not documented and not bound:
            raise TypeError(f"{cls._label}: {cls.__qualname__} overrides {name}, which none of its bases has")
        counts = set(documented or (len(overload["arguments"]) for overload in bound[0] or ()))
        if len(counts) == 1:
            count = counts.pop()
            try:
                inspect.signature(method).bind(None, *range(count))
            except TypeError:
                message = f"{cls._label} calls {cls.__qualname__}.{name} with self and {count} arguments"
                raise TypeError(message) from None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not made._ready:
            raise TypeError(f"{cls._label}: {cls.__qualname__} must call __init__ of its base")
        return made


class FakeObject(metaclass=FakeObjectType):
    """The base of all fakes. It has slots, so that only classes of the code under test accept new attributes."""

    __slots__ = ("__weakref__", "_properties", "_ready")
    _spec: dict[str, Any] | None = {"overrides": {}, "methods": {}}  # noqa: RUF012
    _properties: dict[str, Any]
    _ready: bool

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "FakeObject":
        made = super().__new__(cls)
        made._properties = {}
        made._ready = False
        return made

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self)._label} has no {type(self).__qualname__}.{name} to read")

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError as error:
            raise AttributeError(f"{type(self)._label}: {error}") from None
