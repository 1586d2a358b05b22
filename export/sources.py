"""Find what a source names (folder, file, hub name) and read files of weights without running anything in them."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..runtime.errors import first_line
from .check import ExportError
from .hub_names import fault_of_hub_name

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Suffixes of files of weights."""
WRAPPERS = ("state_dict", "controlnet")
"""Keys under which trainers save the weights beside other values."""

_DIFFUSERS_FILE = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?P<variant>.*)\.(?:safetensors|bin)")
_finite: set[tuple[tuple[str, int, int], ...]] = set()
"""Sets of files whose values were found finite: path, time of modification and size of each."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True)
class Weights:
    """The content of a file of weights.

    Attributes:
        tensors: by name.
        settings: other values that the file holds beside the tensors, such as `animatediff_config`.
        metadata: of a safetensors file; else empty.
    """

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    metadata: dict[str, str]


def quoted(source: str) -> str:
    """A source as errors show it: a long path without its beginning, so that the error stays readable."""
    return repr(source if len(source) <= 70 else f"...{source[-67:]}")


def cannot_load(field: str, source: str, error: BaseException) -> ExportError:
    """An error of a library as an ExportError of one short line."""
    return _refused(field, source, shorten(first_line(error), 90, placeholder=" ..."))


def _refused(field: str, source: str, reason: str, remedy: str = "") -> ExportError:
    return ExportError(field, f"cannot load {quoted(source)}: {reason}", remedy)


def is_file(source: str) -> bool:
    """Whether a source names one file of weights, here or on the hub, instead of a folder or a hub name."""
    return (Path(source).suffix in SUFFIXES and not Path(source).is_dir()) or Path(source).is_file()


def check_place(field: str, source: str) -> None:
    """Raises ExportError if a source is no folder, and is written like a path or cannot come from the hub."""
    if Path(source).is_dir():
        return
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ExportError(field, f"{quoted(source)} is not a folder")
    if fault := fault_of_hub_name(source):
        raise _refused(field, source, fault)


def find_file(field: str, source: str) -> Path:
    """Returns the path of a file, which is downloaded if `source` is `OWNER/NAME/FILE` on the hub.

    Raises:
        ExportError: there is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or len(path.parts) < 3:
        raise _refused(field, source, "no such file", "give a file, a folder or a name on the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(path.parts[:2]), "/".join(path.parts[2:])))
    except Exception as error:  # the network, the hub or its cache
        raise cannot_load(field, source, error) from None


def read_weights(field: str, source: str) -> Weights:
    """Reads a file of weights: safetensors, or torch's own formats without the code that they may hold.

    The format is told from the content. Wrappers such as `{"state_dict": ...}` are opened.

    Raises:
        ExportError: the file is missing, damaged, something other than weights, or has a value that is not finite.
    """
    path = find_file(field, source)
    loaded, metadata = read_content(field, source, path)
    settings: dict[str, Any] = {}
    while isinstance(loaded, Mapping) and (
        key := next((k for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
    ):
        settings |= {name: value for name, value in loaded.items() if name != key}
        loaded = loaded[key]
    entries = loaded if isinstance(loaded, Mapping) else {}
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    settings |= {str(name): value for name, value in entries.items() if not isinstance(value, torch.Tensor)}
    if not tensors:
        raise _refused(field, source, "it holds no weights", "give a checkpoint")
    check_finite_once(field, [path], tensors, lambda _: source)
    return Weights(tensors, settings, metadata)


def read_content(field: str, source: str, path: Path) -> tuple[Any, dict[str, str]]:
    """Returns what was saved in a file, and its metadata. No code in it is run.

    Raises:
        ExportError: the file is damaged, or holds code.
    """
    try:
        if is_safetensors(field, source, path):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), {}
    except ExportError:
        raise
    except UnpicklingError:
        reason = "it holds code besides weights, which is not run, or is damaged"
        raise _refused(field, source, reason, "convert it to safetensors") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(field, source) from None
    except OSError as error:
        raise cannot_load(field, source, error) from None


def _damaged(field: str, source: str) -> ExportError:
    return _refused(field, source, "it is damaged or holds no weights", "download it again")


def is_safetensors(field: str, source: str, path: Path) -> bool:
    """Tells safetensors from torch's formats.

    Raises:
        ExportError: the file is neither, such as a web page or a pointer of Git LFS.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise _refused(field, source, "it is a pointer of Git LFS instead of the weights", "run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise _refused(field, source, "it is a web page instead of weights", "download the file itself")
    if head.startswith((b"PK", b"\x80")):
        return False
    if len(head) < 9 or head[8:9] != b"{":
        raise _damaged(field, source)
    return True


def check_finite_once(
    field: str, files: list[Path], tensors: Mapping[str, torch.Tensor], file_of: Callable[[str], str]
) -> None:
    """Checks the values of some files when they are first read: an export reads most of them twice.

    Without `files`, it checks every time.
    """
    key = tuple((str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    if key not in _finite or not files:
        check_finite(field, tensors, file_of)
        _finite.add(key)


def check_finite(field: str, tensors: Mapping[str, torch.Tensor], file_of: Callable[[str], str]) -> None:
    """Raises ExportError if a value is NaN or infinite; names the tensor and its file, which `file_of` tells."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # the sum is not finite if any value is not; it takes a tenth of the time of looking at each value
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ExportError(
                field, f"{name} in {quoted(file_of(name))} has values that are NaN or infinite", "give intact weights"
            )


def check_complete(field: str, source: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raises ExportError if a checkpoint lacks weights or has weights that would be dropped."""
    unused = [name for name in unexpected if not name.endswith("position_ids")]
    for names, verb in ((sorted(missing), "lacks"), (sorted(unused), "has")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            fault = "" if verb == "lacks" else ", which its model does not have"
            raise ExportError(field, f"{quoted(source)} {verb} {names[0]}{others}{fault}", "give a whole checkpoint")


def fill(field: str, source: str, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Assigns all weights of `model`, as float32.

    Raises:
        ExportError: a weight is missing, left over, or has another shape.
    """
    own = model.state_dict()
    check_complete(field, source, own.keys() - tensors.keys(), tensors.keys() - own.keys())
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise ExportError(
                field,
                f"{quoted(source)}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}",
                "give a checkpoint of Stable Diffusion 1.5",
            )
    as_float = {name: tensors[name].float() if own[name].is_floating_point() else tensors[name] for name in own}
    model.load_state_dict(as_float, assign=True)


def choose_variant(field: str, source: str, subfolder: str | None, asked: str | None) -> str | None:
    """Returns which variant of the weights (`fp16`) to load from a folder, None for the plain ones.

    The asked one goes first, then the plain weights, then the only one that is there.

    Raises:
        ExportError: several variants lie there, no plain weights, and none was asked for.
    """
    folder = Path(source) / (subfolder or "")
    if not folder.is_dir():
        return asked
    found = {variant for _, variant in weight_files(folder)}
    if asked in found or None in found or not found:
        return asked if asked in found else None
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise ExportError(field, f"{quoted(source)} holds the variants {names}", "choose one with --variant")
    return found.pop()


def weight_files(folder: Path) -> list[tuple[Path, str | None]]:
    """Returns the files of weights of a folder in diffusers format, with their variants."""
    files = []
    for path in sorted(folder.iterdir()):
        if match := _DIFFUSERS_FILE.fullmatch(path.name):
            files.append((path, _SHARD.sub("", match["variant"]).removeprefix(".") or None))
    return files


def cached_folder(source: str, subfolder: str | None) -> Path:
    """Returns the folder of a source in diffusers format, in the hub's cache if it is a name on the hub."""
    folder = Path(source) / (subfolder or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, f"{subfolder}/config.json" if subfolder else "config.json")
    return Path(config).parent if isinstance(config, str) else folder


def file_of(place: str, variant: str | None, name: str) -> str:
    """Returns the file that holds the weight `name`, or `place` if that is no folder or has no such file."""
    folder = Path(place)
    if not folder.is_dir():
        return place
    files = [path for path, found in weight_files(folder) if found == variant]
    files = [path for path in files if path.suffix == ".safetensors"] or files
    if len(files) == 1:
        return str(files[0])
    maps = (
        json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}) for index in folder.glob("*.index*.json")
    )
    return next((str(folder / names[name]) for names in maps if name in names), place)
