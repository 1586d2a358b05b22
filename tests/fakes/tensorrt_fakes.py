"""Strict fakes of TensorRT's Python module: names that a release lacks and arguments that it refuses raise.

    trt = fake_tensorrt("11.4")
    trt.answers["ICudaEngine.get_tensor_shape"] = lambda engine, name: (2, 4)
    build(trt)
    assert ("IBuilderConfig.set_flag", (trt.BuilderFlag.REFIT,), {}) in trt.calls

Recorded names use the class that defines the member, as in `ILayer.name`. An answer may also use a derived class.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from fakes.tensorrt_dump import load_api, split
from fakes.tensorrt_objects import FakeEnum, FakeObject, FakeObjectType, FakeType

Spec = dict[str, Any]
DEFAULTS: dict[str, Callable[[], Any]] = {"bool": lambda: True, "int": int, "str": str, "float": float, "bytes": bytes}
PLAIN: dict[str, type] = {"str": str, "tuple": tuple, "list": list, "slice": slice, "numpy.ndarray": np.ndarray}
NULLABLE = {"object", "typing_extensions.CapsuleType", ""}


def fake_tensorrt(version: str) -> "FakeModule":
    """Creates a fake of TensorRT "10.16" or "11.4", or of TensorRT-RTX "rtx-1.7"; raises the errors of `load_api`."""
    return FakeModule(version, load_api(version))


class FakeModule(ModuleType):
    """A fake module. It records calls in `calls`; `answers` holds functions that replace methods and properties."""

    def __init__(self, version: str, api: Spec) -> None:
        super().__init__("tensorrt_rtx" if version.startswith("rtx") else "tensorrt")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: dict[str, Callable[..., Any]] = {}
        self.__version__ = api["version"]
        self._label = f"TensorRT {version}"
        self._api = api
        self._classes = _Classes(self._made, api["classes"])

    def __getattr__(self, name: str) -> Any:
        """Makes a class or function of the module when it is first asked for: tests use few of them."""
        if name in self._api["constants"]:
            value = self._constant(self._api["constants"][name])
        elif name in self._api["functions"]:
            value = self._function(name, self._api["functions"][name])
        else:
            raise AttributeError(f"{self._label} has no {name}")
        setattr(self, name, value)
        return value

    def _made(self, name: str, spec: Spec) -> None:
        self._classes[name] = self._enum(name, spec) if "members" in spec else self._class(name, spec)
        for attribute, constant in spec["attributes"].items():
            setattr(self._classes[name], attribute, self._constant(constant))

    def new(self, name: str, /, **properties: Any) -> Any:
        """Creates an instance of a class without a constructor, such as ICudaEngine, with values for its properties."""
        cls = self._classes[name]
        made = cls.__new__(cls)
        for key, value in properties.items():
            if not isinstance(getattr(cls, key), property):
                raise AttributeError(f"{self._label}: {name}.{key} is not a property")
            made._properties[key] = value
        made._ready = True
        return made

    def _constant(self, constant: Spec) -> Any:
        if "value" in constant:
            return constant["value"]
        cls = self._classes[constant["class"]]
        return cls.__members__[constant["member"]] if "member" in constant else cls

    def _enum(self, name: str, spec: Spec) -> Any:
        namespace = {"__qualname__": name, "_label": self._label, "_ordered": spec["ordered"], "__members__": {}}
        cls: Any = FakeType(name.rpartition(".")[2], (FakeEnum,), namespace)
        for key, values in spec["members"].items():
            member = object.__new__(cls)
            vars(member).update(values)
            cls.__members__[key] = member
            setattr(cls, key, member)
        return cls

    def _class(self, name: str, spec: Spec) -> Any:
        bases = tuple(self._classes[base] for base in spec["bases"]) or (FakeObject,)
        namespace: dict[str, Any] = {"__slots__": (), "__qualname__": name, "_label": self._label, "_spec": spec}
        namespace["__init__"] = self._constructor(name, spec["methods"].get("__init__"))
        for key, method in spec["methods"].items():
            if key != "__init__":
                make = self._function if method["static"] else self._method
                function = make(f"{name}.{key}", method["overloads"])
                namespace[key] = staticmethod(function) if method["static"] else function
        for key, described in spec["properties"].items():
            namespace[key] = self._property(f"{name}.{key}", described)
        return FakeObjectType(name.rpartition(".")[2], bases, namespace)

    def _constructor(self, name: str, method: Spec | None) -> Callable[..., None]:
        def construct(made: FakeObject, *args: Any, **kwargs: Any) -> None:
            if method is None:
                raise TypeError(f"{self._label}: {name} has no constructor")
            self._check(name, method["overloads"], args, kwargs, null=())
            self.calls.append((name, args, kwargs))
            made._ready = True

        return construct

    def _function(self, name: str, overloads: list[Spec] | None) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            returns = self._check(name, overloads, args, kwargs)
            self.calls.append((name, args, kwargs))
            return self.answers[name](*args, **kwargs) if name in self.answers else self._default(returns)

        return function

    def _method(self, name: str, overloads: list[Spec] | None) -> Callable[..., Any]:
        key = name.rpartition(".")[2]

        def method(made: FakeObject, *args: Any, **kwargs: Any) -> Any:
            returns = self._check(name, overloads, args, kwargs)
            self.calls.append((name, args, kwargs))
            if (answer := self._answer(made, key)) is not None:
                return answer(made, *args, **kwargs)
            if key == "__getitem__":
                raise IndexError(f"{self._label}: no answer for {name}")  # ends a loop over the items
            return made if key == "__enter__" else self._default(returns)

        return method

    def _property(self, name: str, described: Spec) -> property:
        key = name.rpartition(".")[2]

        def read(made: FakeObject) -> Any:
            if (answer := self._answer(made, key)) is not None:
                return answer(made)
            if key not in made._properties:
                made._properties[key] = self._default(described["getter"][0]["returns"] if described["getter"] else "")
            return made._properties[key]

        def write(made: FakeObject, value: Any) -> None:
            self._check(f"{name}=", described["setter"], (value,), {}, null=(FakeObject, str))
            self.calls.append((f"{name}=", (value,), {}))
            made._properties[key] = value

        return property(read if described["readable"] else None, write if described["settable"] else None)

    def _answer(self, made: FakeObject, key: str) -> Callable[..., Any] | None:
        names = [f"{cls.__qualname__}.{key}" for cls in type(made).__mro__]
        return next((self.answers[name] for name in names if name in self.answers), None)

    def _default(self, annotation: str) -> Any:
        if annotation in DEFAULTS:
            return DEFAULTS[annotation]()
        if annotation.startswith("list"):
            return []
        if annotation.startswith("tuple["):
            return tuple(self._default(part) for part in split(annotation[len("tuple[") : -1]))
        if annotation.startswith("collections.abc.Iterator"):
            return iter(())
        cls = self._classes.get(annotation)
        if cls is None:
            return None
        return next(iter(cls.__members__.values())) if issubclass(cls, FakeEnum) else self.new(annotation)

    def _check(
        self,
        name: str,
        overloads: list[Spec] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        null: tuple[type, ...] = (FakeObject,),
    ) -> str:
        """Returns the return annotation of the overload that accepts the arguments; types in `null` accept None."""
        if overloads is None:
            return ""
        for overload in overloads:
            if overload["variadic"] or self._takes(overload["arguments"], args, kwargs, null):
                return str(overload["returns"])
        texts = [", ".join(f"{one['name']}: {one['annotation']}" for one in each["arguments"]) for each in overloads]
        given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        raise TypeError(f"{self._label}: {name} takes ({') or ('.join(texts)}), not ({given})")

    def _takes(
        self, arguments: list[Spec], args: tuple[Any, ...], kwargs: dict[str, Any], null: tuple[type, ...]
    ) -> bool:
        rest = arguments[len(args) :]
        named = {argument["name"]: argument for argument in rest if not argument["positional"]}
        missing = [argument for argument in rest if argument["default"] is None and argument["name"] not in kwargs]
        if len(args) > len(arguments) or missing or kwargs.keys() - named.keys():
            return False
        pairs = [*zip(arguments, args, strict=False), *((named[key], value) for key, value in kwargs.items())]
        return all(self._fits(argument, value, null) for argument, value in pairs)

    def _fits(self, argument: Spec, value: Any, null: tuple[type, ...] = ()) -> bool:
        annotation = argument["annotation"]
        expected: Any = self._classes.get(annotation) or PLAIN.get(annotation, object)
        if value is None:
            return argument["default"] == "None" or annotation in NULLABLE or issubclass(expected, null)
        if annotation == "typing.SupportsInt":
            return hasattr(value, "__int__") and not isinstance(value, float)
        if annotation == "typing_extensions.Buffer":
            return isinstance(value, self._classes["IHostMemory"]) or _is_buffer(value)
        if annotation.startswith("collections.abc.Sequence"):
            one = {"annotation": annotation[len("collections.abc.Sequence[") : -1], "default": None}
            items = hasattr(value, "__len__") and not isinstance(value, str | bytes)
            return items and all(self._fits(one, item) for item in value)
        if isinstance(value, expected):
            return True
        # pybind11 converts tuples to Dims and arrays to Weights.
        made_of = [one["arguments"] for one in _overloads(expected, "__init__")]
        plain = [one[0] for one in made_of if len(one) == 1 and one[0]["annotation"] not in self._classes]
        return not isinstance(value, FakeObject | FakeEnum) and any(self._fits(one, value) for one in plain)


class _Classes(dict[str, Any]):
    """The classes of a module by name, made when they are first asked for."""

    def __init__(self, make: Callable[[str, Spec], None], specs: dict[str, Spec]) -> None:
        super().__init__()
        self._make, self._specs = make, specs

    def __missing__(self, name: str) -> Any:
        self._make(name, self._specs[name])
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._specs else default


def _overloads(cls: Any, name: str) -> list[Spec]:
    methods = (getattr(cls, "_spec", None) or {"methods": {}})["methods"]
    return methods.get(name, {}).get("overloads") or []


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True
