"""The tiny decoder: its graph compared with diffusers' AutoencoderTiny, both weight formats, and wrong sources."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from conftest import Exported
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from references import to_uint8
from safetensors.torch import save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import FULL_SIZE, Architecture, write_tiny_decoder
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.export import traced_modules
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_tiny_decoder
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.plan import ExportOptions, plan_jobs, read_parts

Weights = dict[str, torch.Tensor]

BLOCKS = (range(3, 6), range(8, 11), range(13, 16), range(18, 19))
"""Entry numbers of the blocks in each stage of TAESD's decoder."""
ENDS = (7, 12, 17, 19)
"""Entry numbers of the convolutions that end the stages."""


def taesd_weights(width: int = 64, latent_channels: int = 4) -> Weights:
    """Draws random weights with the names and shapes of taesd_decoder.pth."""
    layers = {"1": (width, latent_channels)}
    layers |= {f"{block}.conv.{index}": (width, width) for stage in BLOCKS for block in stage for index in (0, 2, 4)}
    layers |= {str(end): (3 if end == ENDS[-1] else width, width) for end in ENDS}
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, (rows, columns) in layers.items():
        weights[f"{name}.weight"] = torch.randn(rows, columns, 3, 3, generator=generator) / (9 * columns) ** 0.5
        if name not in map(str, ENDS[:-1]):
            weights[f"{name}.bias"] = torch.randn(rows, generator=generator) / 10
    return weights


def taesd(weights: Weights, latents: torch.Tensor) -> torch.Tensor:
    """Computes TAESD's decoder convolution by convolution; returns colours in 0..1."""

    def convolve(name: str, states: torch.Tensor) -> torch.Tensor:
        return F.conv2d(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=1)

    states = convolve("1", 3 * torch.tanh(latents / 3)).relu()
    for blocks, end in zip(BLOCKS, ENDS, strict=True):
        for block in blocks:
            inner = convolve(f"{block}.conv.0", states).relu()
            inner = convolve(f"{block}.conv.2", inner).relu()
            states = (convolve(f"{block}.conv.4", inner) + states).relu()
        if end != ENDS[-1]:
            states = states.repeat_interleave(2, -1).repeat_interleave(2, -2)
        states = convolve(str(end), states)
    return states


def latents_of(batch: int, height: int, width: int) -> torch.Tensor:
    return 2 * torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(height))


def decoded(model: AutoencoderTiny, latents: torch.Tensor) -> np.ndarray:
    """Decodes frames as diffusers' pipelines do, [N, H, W, 3] uint8."""
    with torch.no_grad():
        images = model.decode(latents / model.config.scaling_factor).sample
    return to_uint8(VaeImageProcessor().postprocess(images, output_type="np"))


@pytest.mark.parametrize("sizes", [(1, 4, 4), (3, 9, 5)])
def test_frames_are_those_of_diffusers(exported: Exported, sizes: tuple[int, int, int]) -> None:
    model = AutoencoderTiny.from_pretrained(exported.checkpoints / "tiny_decoder")
    latents = latents_of(*sizes)
    path = exported.bundle / "onnx/vae_decoder_tiny.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (frames,) = session.run(None, {"latents": latents.numpy()})
    expected = decoded(model, latents)
    assert (frames.dtype, frames.shape) == (np.uint8, expected.shape)
    assert expected.std() > 10
    assert np.isin(expected, (0, 255)).mean() < 0.05, "few values are clipped"
    assert_close(frames, expected)


def test_another_scaling_factor() -> None:
    model = AutoencoderTiny(scaling_factor=0.4, decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1)).eval()
    latents = latents_of(1, 4, 6)
    with torch.no_grad():
        frames = traced_modules.TinyDecoder(model)(latents)
    assert_close(frames.numpy(), decoded(model, latents))


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd_decoder.pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_taesd(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {key: values.to(dtype) for key, values in taesd_weights().items()}
    write = save_file if name.endswith("safetensors") else torch.save
    write(weights, tmp_path / name)
    model = load_tiny_decoder(str(tmp_path / name))
    default = AutoencoderTiny()
    assert model.decoder.state_dict().keys() == default.decoder.state_dict().keys()
    latents = latents_of(2, 3, 4)
    with torch.no_grad():
        expected = taesd({key: values.float() for key, values in weights.items()}, latents)
        assert (model.decode(latents).sample / 2 + 0.5 - expected).abs().max() <= 1e-5


def test_a_file_is_planned_as_a_folder_is(sd15_like: Exported, tmp_path: Path) -> None:
    save_file(taesd_weights(), tmp_path / "taesd_decoder.safetensors")
    options = options_of(sd15_like, tmp_path / "taesd_decoder.safetensors")
    assert options.sources()["tiny_decoder"] == "taesd_decoder.safetensors"
    job = plan_jobs(read_parts(options))[-1]
    assert job.spec.name == "vae_decoder_tiny"
    assert "model.decoder.layers.18.weight" in job.build().state_dict()


def options_of(exported: Exported, tiny_decoder: Path) -> ExportOptions:
    root = exported.checkpoints
    return ExportOptions(str(root / "base"), str(root / "motion_adapter"), tiny_decoder=str(tiny_decoder))


def test_the_full_size_is_that_of_taesd(tmp_path: Path) -> None:
    model = AutoencoderTiny.from_pretrained(write_tiny_decoder(tmp_path, FULL_SIZE, seed=1))
    shapes = {name: values.shape for name, values in AutoencoderTiny().state_dict().items()}
    assert {name: values.shape for name, values in model.state_dict().items()} == shapes
    assert all((values != 0).all() for values in model.parameters())


def wide(folder: Path) -> Path:
    AutoencoderTiny(latent_channels=16, decoder_block_out_channels=(8,) * 4).save_pretrained(folder)
    return folder


def written(weights: Weights) -> Callable[[Path], Path]:
    """Returns a function that writes `weights` in TAESD's format."""

    def write(folder: Path) -> Path:
        torch.save(weights, folder.with_suffix(".pth"))
        return folder.with_suffix(".pth")

    return write


def pickled(folder: Path) -> Path:
    """Writes a whole pickled module, which would run code when loaded."""
    torch.save(torch.nn.Linear(1, 1), folder.with_suffix(".pth"))
    return folder.with_suffix(".pth")


def text(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.with_suffix(suffix).write_text("no weights")
        return folder.with_suffix(suffix)

    return write


def encoder(weights: Weights) -> Weights:
    """Renumbers the weights as TAESD's encoder does, whose first entry is a convolution."""
    return {f"{int(name.split('.')[0]) - 1}.{name.partition('.')[2]}": values for name, values in weights.items()}


def without(weights: Weights, name: str) -> Weights:
    return {key: values for key, values in weights.items() if key != name}


NO_DECODER = "tiny_decoder: .* holds no TAESD decoder; give taesd_decoder.safetensors or taesd_decoder.pth"
BAD: list[tuple[Callable[[Path], Path], str]] = [
    (wide, r"tiny_decoder: .* does not fit the base: .* colours are \(16, 8, 3\), the VAE's \(4, 8, 3\)"),
    (
        lambda folder: write_tiny_decoder(folder, Architecture(vae_channels=(8, 8, 8)), 1),
        r"tiny_decoder: .* does not fit the base: .* \(4, 4, 3\), the VAE's \(4, 8, 3\)",
    ),
    (written(taesd_weights(8, latent_channels=16)), r"tiny_decoder: .* does not fit the base: .* \(16, 8, 3\)"),
    (written(encoder(taesd_weights(8))), NO_DECODER),
    (written(without(taesd_weights(8), "4.conv.2.bias")), NO_DECODER),
    (written({"state_dict": torch.zeros(1)}), NO_DECODER),
    (pickled, "^tiny_decoder: cannot load"),
    (text(".safetensors"), "^tiny_decoder: cannot load"),
    (text(".txt"), "^tiny_decoder: .* is not a TAESD file; allowed are .safetensors and .pth"),
    (lambda folder: folder / "nothing", "^tiny_decoder: .* is not a folder"),
    (lambda folder: folder / "nothing.pth", "^tiny_decoder: cannot load .*nothing.pth"),
]


@pytest.mark.parametrize(("source", "message"), BAD)
def test_what_does_not_fit_is_one_line(
    source: Callable[[Path], Path], message: str, sd15_like: Exported, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as error:
        export_bundle(options_of(sd15_like, source(tmp_path / "tiny")), tmp_path / "target" / "bundle")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists() or not list((tmp_path / "target").iterdir())


def test_the_option_of_the_command_line(
    sd15_like: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = sd15_like.checkpoints
    command = ["export", "--base", str(root / "base"), "--motion-adapter", str(root / "motion_adapter")]
    assert run([*command, "--tiny-decoder", str(wide(tmp_path / "wide")), "-o", str(tmp_path / "bundle")]) == 2
    errors = capsys.readouterr().err
    assert "error: --tiny-decoder" in errors
    assert "does not fit the base: " in errors


def test_another_model_is_named(sd15_like: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tiny_decoder: .* holds a AutoencoderKL; give .* AutoencoderTiny"):
        export_bundle(options_of(sd15_like, sd15_like.checkpoints / "base" / "vae"), tmp_path / "bundle")
