"""The TensorRT calls that the build options lead to, with strict fakes of each release, and refused options."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from fakes.tensorrt_builds import RELEASES, TENSORRT, Workshop, fake, small_copy
from fakes.tensorrt_fakes import FakeModule
from sparsectrl_lcm.engine.quantization.layers import quantizable
from sparsectrl_lcm.engine.tensorrt import builder
from sparsectrl_lcm.engine.tensorrt.configuration import configure
from sparsectrl_lcm.runtime.errors import InvalidRequest, SparseCtrlLcmError
from sparsectrl_lcm.runtime.format.build_options import HARDWARE_COMPATIBILITY, BuildOptions


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


def configured(release: str, **options: Any) -> FakeModule:
    """Returns a fake that has recorded the calls of `configure`."""
    trt = fake(release)
    configure(trt, trt.new("IBuilderConfig"), RELEASES[release] == "tensorrt-rtx", BuildOptions(**options))
    return trt


def settings(trt: FakeModule) -> dict[str, Any]:
    """Returns the properties that were set, by name."""
    return {name[len("IBuilderConfig.") : -1]: args[0] for name, args, _ in trt.calls if name.endswith("=")}


def arguments(trt: FakeModule, method: str) -> list[tuple[Any, ...]]:
    return [args for name, args, _ in trt.calls if name == f"IBuilderConfig.{method}"]


@pytest.mark.parametrize("release", RELEASES)
def test_by_default_little_is_asked_of_the_builder(release: str) -> None:
    trt = configured(release)
    common = {
        "builder_optimization_level": 3,
        "max_aux_streams": 0,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if RELEASES[release] == "tensorrt":
        assert settings(trt) == common | {"hardware_compatibility_level": trt.HardwareCompatibilityLevel.NONE}
        assert arguments(trt, "set_flag") == []
    else:
        assert settings(trt) == common | {"num_compute_capabilities": 0}
        assert arguments(trt, "set_flag") == [(trt.BuilderFlag.REQUIRE_USER_ALLOCATION,)]
    assert arguments(trt, "clear_flag") == [(trt.BuilderFlag.TF32,)]
    assert arguments(trt, "set_memory_pool_limit") == []


@pytest.mark.parametrize("release", TENSORRT)
def test_every_option_of_tensorrt_reaches_the_builder(release: str) -> None:
    trt = configured(
        release,
        optimization_level=5,
        aux_streams=2,
        workspace=1.5,
        tf32=True,
        strip_weights=True,
        version_compatible=True,
        hardware_compatibility="ampere-plus",
    )
    assert settings(trt) == {
        "builder_optimization_level": 5,
        "max_aux_streams": 2,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "hardware_compatibility_level": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    flags = trt.BuilderFlag
    assert {flag for (flag,) in arguments(trt, "set_flag")} == {
        flags.REFIT_INDIVIDUAL,
        flags.STRIP_PLAN,
        flags.VERSION_COMPATIBLE,
    }
    assert arguments(trt, "clear_flag") == []
    assert arguments(trt, "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 3 << 29)]


def test_every_option_of_tensorrt_rtx_reaches_the_builder() -> None:
    capabilities = ("8.9", "12.0")
    trt = configured(
        "rtx-1.7",
        optimization_level=0,
        aux_streams=1,
        workspace=2,
        tf32=True,
        strip_weights=True,
        compute_capabilities=capabilities,
    )
    assert settings(trt) == {
        "builder_optimization_level": 0,
        "max_aux_streams": 1,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "num_compute_capabilities": 2,
    }
    flags = trt.BuilderFlag
    assert {flag for (flag,) in arguments(trt, "set_flag")} == {
        flags.REFIT_INDIVIDUAL,
        flags.STRIP_PLAN,
        flags.REQUIRE_USER_ALLOCATION,
    }
    assert arguments(trt, "clear_flag") == []
    assert arguments(trt, "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 2 << 30)]
    known = trt.ComputeCapability
    assert arguments(trt, "set_compute_capability") == [(known.SM89, 0), (known.SM120, 1)]


@pytest.mark.parametrize("release", RELEASES)
def test_refit_alone_leaves_the_weights_in(release: str) -> None:
    trt = configured(release, refit=True)
    flags = [flag for (flag,) in arguments(trt, "set_flag")]
    assert trt.BuilderFlag.REFIT_INDIVIDUAL in flags
    assert not {trt.BuilderFlag.REFIT, trt.BuilderFlag.STRIP_PLAN} & set(flags)


@pytest.mark.parametrize("release", TENSORRT)
@pytest.mark.parametrize("level", HARDWARE_COMPATIBILITY)
def test_each_hardware_compatibility_has_its_level(release: str, level: str) -> None:
    trt = configured(release, hardware_compatibility=level)
    expected = getattr(trt.HardwareCompatibilityLevel, level.upper().replace("-", "_"))
    assert settings(trt)["hardware_compatibility_level"] == expected


def test_the_order_of_compute_capabilities_does_not_matter() -> None:
    one, other = (BuildOptions(compute_capabilities=given) for given in (("8.9", "12.0"), ("12.0", "8.9")))
    assert one.flags == other.flags


@pytest.mark.parametrize("capability", ["9.0", "8", "current", ""])
def test_an_unknown_compute_capability_is_refused_before_anything_is_built(capability: str, bundle: Path) -> None:
    workshop = Workshop("rtx-1.7")
    with pytest.raises(SparseCtrlLcmError, match="compute_capabilities") as error:
        workshop.build(bundle, compute_capabilities=("8.9", capability))
    assert workshop.calls("Builder", "OnnxParser") == []
    message = str(error.value)
    assert repr(capability) in message
    assert "\n" not in message
    allowed = message.partition("allowed are ")[2].split(", ")
    assert sorted(allowed) == sorted(["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])


def test_an_option_of_the_other_backend_is_refused(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="compute_capabilities: only for tensorrt-rtx"):
        Workshop("11.4").build(bundle, compute_capabilities=("8.9",))
    with pytest.raises(InvalidRequest, match="hardware_compatibility: only for tensorrt"):
        Workshop("rtx-1.7").build(bundle, hardware_compatibility="ampere-plus")
    assert not (bundle / "engines").exists()


def test_version_compatibility_is_refused_for_tensorrt_rtx(bundle: Path) -> None:
    """TensorRT-RTX has the flag, but builds fail with it: there is no lean runtime."""
    with pytest.raises(InvalidRequest, match="version_compatible: only for tensorrt"):
        Workshop("rtx-1.7").build(bundle, version_compatible=True)
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_weights_of_transposed_upsamplers_cannot_be_replaced(option: str, bundle: Path) -> None:
    """They are sums of the bundle's weights, which no refit would find by name."""
    with pytest.raises(InvalidRequest, match="transposed_upsampling: .* leave out refit and strip_weights"):
        Workshop("11.4").build(bundle, transposed_upsampling=True, **{option: True})
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
@pytest.mark.parametrize("fp16_sums", [False, True])
def test_layers_in_fp16_ask_for_fp32_sums_also_beside_fp8(
    precision: str, fp16_sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no layer has a range, so all of them stay in fp16."""
    monkeypatch.setattr(builder, "calibrate", lambda *_: {})
    bundle = small_copy(tmp_path, decoder="vae_decoder")
    index = Workshop("rtx-1.7").build(
        bundle, graphs=("vae_decoder",), precision=precision, keep_source=True, fp16_sums=fp16_sums
    )
    (source,) = (bundle / "engines").rglob("vae_decoder.onnx")
    sums = [node for node in ir.load(source).graph if node.op_type == "Cast" and ".input1" in (node.name or "")]
    assert bool(sums) is not fp16_sums
    assert index.engines["vae_decoder"].spec.flags.get("fp16_sums", False) is fp16_sums  # part of the key


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_upsampling_is_off_unless_asked_for(transposed: bool, bundle: Path) -> None:
    index = Workshop("rtx-1.7").build(
        bundle, graphs=("vae_decoder",), keep_source=True, **({"transposed_upsampling": True} if transposed else {})
    )
    (source,) = (bundle / "engines").rglob("vae_decoder.onnx")
    operators = {node.op_type for node in ir.load(source).graph}
    assert ("ConvTranspose" in operators, "Resize" in operators) == (transposed, not transposed)
    assert index.engines["vae_decoder"].spec.flags.get("transposed_upsampling", False) is transposed  # part of the key


def test_layers_with_a_range_are_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = small_copy(tmp_path, decoder="vae_decoder")
    ranges = {str(layer.name): 8.0 for layer in quantizable(ir.load(bundle / "onnx/vae_decoder.onnx"))}
    without = "decoder.mid_block.resnets.0.conv1"
    monkeypatch.setattr(builder, "calibrate", lambda *_: {"vae_decoder": without_layer(ranges, without)})
    Workshop("rtx-1.7").build(bundle, graphs=("vae_decoder",), precision="fp8", keep_source=True)
    (source,) = (bundle / "engines").rglob("vae_decoder.onnx")
    in_fp8 = [name for name in ir.load(source).graph.initializers if name.endswith(".weight.fp8")]
    assert "decoder.mid_block.resnets.0.conv2.weight.fp8" in in_fp8
    assert f"{without}.weight.fp8" not in in_fp8


def without_layer(ranges: dict[str, float], module: str) -> dict[str, float]:
    kept = {name: largest for name, largest in ranges.items() if not name.startswith(f"{module}/")}
    assert len(kept) == len(ranges) - 1
    return kept
