"""Read the Python API of TensorRT's real bindings as plain data, without TensorRT or a GPU.

`load_api` runs this file as `python tensorrt_dump.py MODULE [LIBRARY ...]`, because a process cannot unload bindings.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

CACHE = Path(__file__).parents[2] / ".cache" / "tensorrt-bindings"
RELEASES = {"10.16": "10.16.1.11", "11.4": "11.4.0.106", "rtx-1.7": "1.7.1.116"}
RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"

# The symbols that `tensorrt.so` takes from TensorRT's libraries. An import resolves them but calls none.
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Methods that every Python object has, or that Python calls implicitly.
UNRECORDED = {"__eq__", "__ne__", "__hash__", "__repr__", "__del__", "__getstate__", "__setstate__"}


@functools.cache
def load_api(version: str) -> dict[str, Any]:
    """Returns the API of "10.16", "11.4" or "rtx-1.7"; reads it on first use, then takes it from the cache.

    Raises:
        ModuleNotFoundError: the packages of "rtx-1.7" are not installed.
        RuntimeError: the bindings cannot be read, or have another version.
    """
    release = RELEASES[version]
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    dumped = CACHE / f"{release}-{digest}.json"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{release}.lock"):
        if not dumped.exists():
            text = _dump_rtx() if version.startswith("rtx") else _dump_wheel(CACHE / release, version)
            if (found := json.loads(text)["version"]) != release:
                raise RuntimeError(f"expected TensorRT {release} for {version}, found {found}")
            partial = dumped.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(dumped)
    return json.loads(dumped.read_text())  # type: ignore[no-any-return]


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr}")
    return done.stdout


def _dump_wheel(folder: Path, version: str) -> str:
    if not (folder / "tensorrt_bindings").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        requirements = Path(__file__).with_name(f"tensorrt-bindings-{version}.txt")
        _run(*pip, "--target", str(folder), "--requirement", str(requirements))
    major = version.partition(".")[0]
    sources = {"nvinfer": "".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS)}
    libraries = []
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = folder / f"lib{name}.so.{major}"
        source = folder / f"{name}.c"
        source.write_text(sources.get(name, ""))
        compiler = os.environ.get("CC", "cc")
        _run(compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source))
        libraries.append(str(library))
    return _run(sys.executable, __file__, "tensorrt_bindings", *libraries, PYTHONPATH=str(folder))


def rtx_libraries() -> list[str]:
    """Returns the libraries to load before `import tensorrt_rtx_bindings`.

    Raises:
        ModuleNotFoundError: TensorRT-RTX is not installed.
    """
    specs = [importlib.util.find_spec(name) for name in (RTX_LIBRARIES, "tensorrt_rtx_bindings")]
    if specs[0] is None or specs[1] is None:
        needs = f"onnxruntime-ep-nv-tensorrt-rtx-cu13 tensorrt_rtx_cu13_bindings=={RELEASES['rtx-1.7']}"
        raise ModuleNotFoundError(f"TensorRT-RTX is not installed: pip install --no-deps {needs}")
    folder = Path(next(iter(specs[0].submodule_search_locations or ())))
    # The parser takes symbols from the core library, so the core library comes first.
    return [str(path) for name in ("rtx", "onnxparser_rtx") for path in folder.glob(f"libtensorrt_{name}.so.*")]


def _dump_rtx() -> str:
    return _run(sys.executable, __file__, "tensorrt_rtx_bindings", *rtx_libraries())


def split(text: str) -> list[str]:
    """Splits at commas outside brackets and strings: `a: X = <X.A: 0>, b: list[int] = ','` gives two parts."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == "'"
        depth += not quoted and (character in "([{<") - (character in ")]}>")
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class Dump:
    """Reads an imported bindings module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.found: dict[str, Any] = {}
        self._find(module)

    def _find(self, scope: Any) -> None:
        for value in vars(scope).values():
            ours = isinstance(value, type) and value.__module__.startswith(self.module.__name__)
            if ours and value.__qualname__ not in self.found:
                self.found[value.__qualname__] = value
                self._find(value)

    def api(self) -> dict[str, Any]:
        public = {name: value for name, value in vars(self.module).items() if not name.startswith("_")}
        functions = {name: value for name, value in public.items() if callable(value) and not isinstance(value, type)}
        others = {name: self.constant(value) for name, value in public.items() if name not in functions}
        return {
            "version": self.module.__version__,
            "classes": {name: self.describe(cls) for name, cls in self.found.items()},
            "functions": {name: self.overloads(name, value.__doc__) for name, value in functions.items()},
            "constants": {name: value for name, value in others.items() if value is not None},
        }

    def describe(self, cls: Any) -> dict[str, Any]:
        """Describes a class: its bases, and its own enum members, properties, attributes and methods."""
        described: dict[str, Any] = {
            "bases": [base.__qualname__ for base in cls.__bases__ if base.__qualname__ in self.found],
            "attributes": {},
            "properties": {},
            "methods": {},
            # Some interfaces bind no methods, or not those that are called: the docstring shows what to override.
            "overrides": {
                name: len(split(arguments))
                for name, arguments in re.findall(r"def ([a-z]\w*)\(self,? ?(.*?)\)", cls.__doc__ or "")
            },
        }
        own = vars(cls)
        if hasattr(cls, "__members__"):
            names = [name for name, value in own.items() if type(value) is property]
            members = cls.__members__.items()
            described["members"] = {name: {key: getattr(member, key) for key in names} for name, member in members}
            described["ordered"] = "__lt__" in own
            return described
        for name, value in own.items():
            if type(value) is property:
                described["properties"][name] = {
                    "readable": value.fget is not None,
                    "settable": value.fset is not None,
                    "getter": self.overloads("", getattr(value.fget, "__doc__", None)),
                    "setter": self.overloads("", getattr(value.fset, "__doc__", None)),
                }
            elif isinstance(value, staticmethod):
                overloads = self.overloads(name, value.__func__.__doc__, bound=False)
                described["methods"][name] = {"static": True, "overloads": overloads}
            elif callable(value) and not isinstance(value, type):
                # A class without a constructor inherits that of object.
                if (
                    name not in UNRECORDED
                    and not name.startswith("_pybind11")
                    and type(value) is not type(int.__init__)
                ):
                    described["methods"][name] = {"static": False, "overloads": self.overloads(name, value.__doc__)}
            elif not name.startswith("_") and (constant := self.constant(getattr(cls, name))) is not None:
                described["attributes"][name] = constant
        return described

    def constant(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, type):
            return {"class": value.__qualname__} if value.__qualname__ in self.found else None
        if hasattr(type(value), "__members__"):
            return {"class": type(value).__qualname__, "member": value.name}
        return {"value": value} if isinstance(value, str | int | float) else None

    def overloads(self, name: str, text: str | None, bound: bool = True) -> list[dict[str, Any]] | None:
        """Returns the signatures in a docstring of pybind11, or None if it has none."""
        lines = (text or "").strip().splitlines()
        if "Overloaded function." in lines:
            lines = [line for line in lines if re.match(rf"\d+\. {re.escape(name)}\(", line)]
        matches = [re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", line) for line in lines]
        if not matches or matches[0] is None:
            return None
        return [self._signature(match[1], match[2], bound) for match in matches if match]

    def _signature(self, arguments: str, returns: str, bound: bool) -> dict[str, Any]:
        parsed: list[dict[str, Any]] = []
        for part in split(arguments)[bound:]:
            name, _, rest = part.partition(": ")
            annotation, _, default = rest.partition(" = ")
            parsed.append(
                {
                    "name": name,
                    "annotation": self.resolve(annotation),
                    "default": default or None,
                    # pybind11 prints argument 0 as arg0 if it has no name.
                    "positional": re.fullmatch(r"arg\d+", name) is not None,
                }
            )
        names = [argument["name"] for argument in parsed]
        for argument in parsed[: names.index("/") if "/" in names else 0]:
            argument["positional"] = True
        return {
            "arguments": [argument for argument in parsed if argument["name"].isidentifier()],
            "variadic": any(name.startswith("*") for name in names),
            "returns": self.resolve(returns),
        }

    def resolve(self, annotation: str) -> str:
        """Writes `nvonnxparser::IParserError` and `tensorrt_bindings.tensorrt.ParserError` alike, as `ParserError`."""

        def known(match: re.Match[str]) -> str:
            parts = re.split(r"\.|::", match[0])
            names = [".".join(parts[start:]) for start in range(len(parts))]
            if "::" in match[0]:
                names.append(parts[-1].removeprefix("I"))
            return next((name for name in names if name in self.found), match[0])

        return re.sub(r"\w+(?:(?:\.|::)\w+)*", known, annotation.strip())


if __name__ == "__main__":
    for library in sys.argv[2:]:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    json.dump(Dump(importlib.import_module(sys.argv[1])).api(), sys.stdout)
