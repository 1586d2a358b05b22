"""Broken, incomplete and hostile checkpoints: refused in one short line, by the loader that opens them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_checkpoints
from sparsectrl_lcm.export import checkpoints as loaders
from sparsectrl_lcm.export.check import ExportError, check, largest_error
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.graph_specs import GraphSpec
from sparsectrl_lcm.export.loading import DEFAULTS, LoadOptions
from sparsectrl_lcm.export.lora_files import Lora
from sparsectrl_lcm.export.plan import ExportOptions, read_parts

ARCH = Architecture(channels=(32, 64), heads=8, motion_heads=8, groups=32, motion_mid_block=True)
PARTS = {
    "text_encoder": "base/text_encoder/model.safetensors",
    "unet": "base/unet/diffusion_pytorch_model.safetensors",
    "vae": "base/vae/diffusion_pytorch_model.safetensors",
    "motion_adapter": "motion_adapter/diffusion_pytorch_model.safetensors",
    "controlnet": "scribble/diffusion_pytorch_model.safetensors",
    "tiny_decoder": "tiny_decoder/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoints(folder, ARCH)
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "root"))


def load(part: str, root: Path, options: LoadOptions = DEFAULTS) -> torch.nn.Module:
    base, motion = str(root / "base"), str(root / "motion_adapter")
    match part:
        case "text_encoder":
            return loaders.load_text_encoder(base, [], options)
        case "unet":
            return loaders.load_unet(base, motion, [], options)
        case "vae":
            return loaders.load_vae(base, None, options)
        case "motion_adapter":
            return loaders.load_motion_adapter(motion, options)
        case "controlnet":
            return loaders.load_controlnet("scribble", str(root / "scribble"), options)
    return loaders.load_tiny_decoder(str(root / "tiny_decoder"), options)


def refusal(load_it: Callable[[], object]) -> str:
    with pytest.raises(ExportError) as error:
        load_it()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 200, message
    return message


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_is_there_finite_and_used(part: str, root: Path) -> None:
    path = root / PARTS[part]
    weights = load_file(path)
    name = next(key for key, value in sorted(weights.items()) if value.ndim > 1)

    def written(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, path, {"format": "pt"})
        return refusal(lambda: load(part, root))

    assert " lacks " in written({key: value for key, value in weights.items() if key != name})
    assert " has surplus.weight, which its model does not have" in written({**weights, "surplus.weight": torch.ones(2)})
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = weights[name].clone()
        broken.view(-1)[-1] = value
        message = written({**weights, name: broken})
        assert name.removeprefix("text_model.") in message
        assert f"{path.name}' has values that are NaN or infinite" in message
    written({**weights, name: torch.ones(3)})


def test_large_weights_are_finite(root: Path) -> None:
    """Their sum overflows, although each is finite."""
    path = root / PARTS["vae"]
    weights = load_file(path)
    save_file({**weights, "encoder.conv_in.weight": torch.full_like(weights["encoder.conv_in.weight"], 3e38)}, path)
    load("vae", root)


def test_motion_modules_under_another_configuration(root: Path) -> None:
    """The middle block of v2 is not dropped under a configuration of v3, nor filled at random the other way round."""
    config = root / "motion_adapter" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_motion_mid_block": False}))
    assert "has mid_block.motion_modules.0." in refusal(lambda: load("motion_adapter", root))


class Payload:
    """Runs a program when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        import os

        return os.system, (f"touch '{self.file}'",)


def hostile_files(folder: Path) -> dict[str, Path]:
    good = folder / "good.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.ones(40, 4)}, good)
    torch.save({"x": torch.ones(400)}, folder / "good.ckpt")
    torch.save({"state_dict": {"x": torch.ones(4), "y": Payload(folder / "ran")}}, folder / "payload.ckpt")
    torch.save(Payload(folder / "ran"), folder / "old.bin", _use_new_zipfile_serialization=False)
    save_file({"down_blocks.0.motion_modules.0.proj_in.weight": torch.tensor([1.0, float("nan")])}, folder / "nan.pth")
    torch.save({"wrong": "text"}, folder / "no_tensors.pt")
    contents = {
        "page.safetensors": b"<!DOCTYPE html><html>404</html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        "pointer.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        "empty.ckpt": b"",
        "noise.bin": bytes(range(256)) * 8,
        "short.safetensors": good.read_bytes()[:-7],
        "shorter.safetensors": good.read_bytes()[:20],
        "short.ckpt": (folder / "good.ckpt").read_bytes()[:900],
        "missing.safetensors": None,
    }
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    others = ("payload.ckpt", "old.bin", "nan.pth", "no_tensors.pt")
    return {name: folder / name for name in (*contents, *others)}


def test_files_that_are_no_whole_weights(whole: Path, tmp_path: Path) -> None:
    """Each is refused wherever a file can be given, and no code in it runs."""
    base, motion = str(whole / "base"), str(whole / "motion_adapter")
    reasons = {
        "page.safetensors": "it is a web page",
        "pointer.safetensors": "it is a pointer of Git LFS",
        "pointer.ckpt": "it is a pointer of Git LFS",
        "payload.ckpt": "it holds code besides weights, which is not run",
        "old.bin": "it holds code besides weights, which is not run",
        "missing.safetensors": "no such file",
        "nan.pth": "has values that are NaN or infinite",
    }
    for name, path in hostile_files(tmp_path).items():
        file, options = str(path), LoadOptions(base_config=base)
        attempts: dict[str, Callable[[], object]] = {
            "base": lambda file=file, options=options: loaders.load_unet(file, motion, [], options),
            "motion_adapter": lambda file=file: loaders.load_motion_adapter(file),
            "controlnet_rgb": lambda file=file: loaders.load_controlnet("rgb", file),
            "vae": lambda file=file: loaders.load_vae(base, file),
            "tiny_decoder": lambda file=file: loaders.load_tiny_decoder(file),
            "lora": lambda file=file: loaders.load_text_encoder(base, [Lora(file)]),
        }
        for field, attempt in attempts.items():
            if field == "tiny_decoder" and path.suffix not in (".safetensors", ".pth"):
                continue
            message = refusal(attempt)
            assert message.startswith(f"{field}: "), message
            assert reasons.get(name, "cannot load") in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["page.safetensors", "pointer.safetensors", "short.safetensors"])
def test_broken_files_in_a_folder(kind: str, root: Path, tmp_path: Path) -> None:
    shutil.copy(hostile_files(tmp_path)[kind], root / PARTS["unet"])
    message = refusal(lambda: load("unet", root))
    assert message.startswith("base: cannot load ")


def test_code_in_a_folder_is_not_run(root: Path, tmp_path: Path) -> None:
    path = root / PARTS["unet"]
    path.unlink()
    shutil.copy(hostile_files(tmp_path)["old.bin"], path.with_suffix(".bin"))
    refusal(lambda: load("unet", root))
    assert not (tmp_path / "ran").exists()


def test_a_file_without_a_folder_in_its_name(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    base, motion = str(root / "base"), str(root / "motion_adapter")
    assert "'model.safetensors': it is damaged" in refusal(
        lambda: loaders.load_unet("model.safetensors", motion, [], LoadOptions(base))
    )
    assert "'typo.ckpt': no such file" in refusal(lambda: loaders.load_motion_adapter("typo.ckpt"))
    for name in ("typo.safetensors", "./typo.safetensors"):
        assert f"{name}': no such file" in refusal(lambda name=name: loaders.load_unet(base, motion, [Lora(name)]))
    options = ExportOptions("model.safetensors", motion, base_config="./not-there")
    assert "'model.safetensors': it is damaged" in refusal(lambda: read_parts(options)), "before its settings are read"


@pytest.mark.parametrize("part", PARTS)
def test_variants(part: str, root: Path) -> None:
    """The only variant of a folder is taken, a named one goes first, and several without a name are refused."""
    path = root / PARTS[part]
    expected = load(part, root).state_dict()
    fp16, other = (path.with_name(path.name.replace(".safe", f".{name}.safe")) for name in ("fp16", "non_ema"))
    path.rename(fp16)
    only = load(part, root).state_dict()
    assert all(torch.equal(only[name], value) for name, value in expected.items())
    shutil.copy(fp16, other)
    assert "holds the variants fp16 and non_ema; choose one with --variant" in refusal(lambda: load(part, root))
    weights = load_file(fp16)
    name = next(key for key, value in sorted(weights.items()) if value.ndim > 1)
    save_file({**weights, name: weights[name] * 2}, fp16, {"format": "pt"})
    fp16.rename(path)  # plain weights beside the variant
    shutil.copy(other, fp16)
    asked = load(part, root, LoadOptions(variant="fp16")).state_dict()
    assert all(torch.equal(asked[name], value) for name, value in expected.items())
    plain = load(part, root).state_dict()
    assert any(not torch.equal(plain[name], value) for name, value in expected.items())


def test_everything_is_opened_before_the_first_graph(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE, which comes last, stops an export at once."""
    path = root / PARTS["vae"]
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "decoder.conv_out.bias"}, path)
    monkeypatch.setattr("sparsectrl_lcm.export.exporter.trace", lambda *_: pytest.fail("a graph was traced"))
    options = ExportOptions(str(root / "base"), str(root / "motion_adapter"))
    message = refusal(lambda: export_bundle(options, tmp_path / "bundle"))
    assert "lacks decoder.conv_out.bias" in message
    assert not (tmp_path / "bundle").exists()


def test_the_unet_is_loaded_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the sources loads it last, and its graph is traced first."""
    loaded = []
    load_unet = loaders.load_unet
    monkeypatch.setattr(loaders, "load_unet", lambda *arguments: loaded.append(arguments) or load_unet(*arguments))

    def stop(module: torch.nn.Module, spec: GraphSpec, inputs: object) -> None:
        raise ExportError("export", f"traced {spec.name} first")

    monkeypatch.setattr("sparsectrl_lcm.export.exporter.trace", stop)
    options = ExportOptions(str(root / "base"), str(root / "motion_adapter"))
    assert "traced unet first" in refusal(lambda: export_bundle(options, tmp_path / "bundle"))
    assert len(loaded) == 1


class Session:
    """An ONNX Runtime session whose only output is `value`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def get_inputs(self) -> list[object]:
        return []

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.full(2, self.value, np.float32)]


@pytest.mark.parametrize(("graph", "torchs"), [(1.0, float("nan")), (float("nan"), 1.0), (float("nan"),) * 2])
def test_nan_on_either_side_fails_the_check(graph: float, torchs: float) -> None:
    error = largest_error(Session(graph), (), (torch.full((2,), torchs),))
    with pytest.raises(ExportError, match="differs from torch"):
        check("vae_encoder", error, frames=False)
