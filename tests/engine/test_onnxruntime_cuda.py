"""ONNX Runtime CUDA: typed graphs, and the loop with real bindings to fixed addresses in host memory."""

import logging
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from fakes.gpu_emulation import EmulatedCudart
from pictures import pictures
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.rewrites.nhwc_group_norm import define_group_norms
from sparsectrl_lcm.runtime import BackendError, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.engine_sets import find_set
from sparsectrl_lcm.runtime.gpu import onnxruntime as cuda_backend
from sparsectrl_lcm.runtime.gpu.cuda import Cuda, DeviceOutOfMemory
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 2}
SMALL_SIZE = ClipSize(width=64, height=64, frames=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with engines that the build has checked against fp32."""
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("built") / "bundle"))
    build(bundle, "onnxruntime-cuda")
    assert not list(bundle.rglob("*.defined.onnx")), "they are only compared with fp32"
    return bundle


open_session = cuda_backend._open_session


def open_without_group_norms(path: Path, *arguments: Any) -> Any:
    """Opens a session for a graph whose GroupNorms are replaced with their definition, which the CPU can compute."""
    defined = path.with_suffix(".defined.onnx")
    if not defined.exists():
        model = ir.load(path)
        define_group_norms(model)
        ir.save(model, defined)  # shares the weights
    return open_session(defined, *arguments)


@pytest.fixture
def executor(built: Path, monkeypatch: pytest.MonkeyPatch) -> GpuExecutor:
    """The CUDA loop on the CPU provider: it binds addresses of the emulated device, which are host memory."""
    api = EmulatedCudart()
    cuda = Cuda(api)
    monkeypatch.setattr(
        cuda_backend,
        "_open_session",
        lambda *arguments: SessionOnStream(open_without_group_norms(*arguments), api, cuda.stream),
    )
    monkeypatch.setattr(cuda_backend, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda_backend, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_backend, "provider_options", lambda cuda, graphs: {})
    return GpuExecutor(Bundle.load(built), cuda_backend.OnnxRuntimeCudaLoader(), 1 << 30, cuda)


def waits_for_run(options: Any) -> bool:
    """Whether a run with these options returns only when it is done."""
    try:
        return bool(options.get_run_config_entry("disable_synchronize_execution_providers") != "1")
    except RuntimeError:  # the option is not set
        return True


class SessionOnStream:
    """A session of the CPU provider whose runs are enqueued on an emulated stream."""

    def __init__(self, session: Any, api: EmulatedCudart, stream: int) -> None:
        self.session, self.api, self.stream = session, api, stream

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.api.submit(lambda: self.session.run_with_iobinding(binding, options), self.stream)
        if waits_for_run(options):
            self.api.streams.wait_for_stream(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def test_every_graph_is_typed_and_self_attention_is_fused(built: Path) -> None:
    engines = find_set(built, "onnxruntime-cuda", "fp16")
    assert engines is not None
    bundle = Bundle.load(built)
    assert set(engines.index.engines) == set(bundle.manifest.graphs)
    for graph, record in engines.index.engines.items():
        path = engines.open(bundle.manifest, graph, onnxruntime.__version__)
        assert path.stat().st_size
        errors = record.report["errors"]
        assert max(errors.values(), default=0) <= (3 if graph.startswith("vae_decoder") else 1e-2)
        assert set(record.files) >= {f"{graph}.onnx"}
    count = Counter(
        node.op_type for node in onnx.load(engines.folder / "unet.onnx", load_external_data=False).graph.node
    )
    assert count["MultiHeadAttention"] == 7 + 18, "spatial self-attention, and temporal attention twice per module"
    assert count["Softmax"] == 7, "attention to the text"
    assert count["GroupNorm"] == 39
    assert count["InstanceNormalization"] == 0


def test_frames_are_close_to_those_of_the_cpu_backend(executor: GpuExecutor, built: Path) -> None:
    device, host = VideoPipeline(executor.bundle, executor), VideoPipeline.load(built, "onnxruntime")
    keyframes = [Keyframe(index, image) for index, image in zip((0, 5), pictures(2, 96, 64), strict=True)]
    size = {"width": 96, "height": 64, "num_frames": 8}
    for options in ({}, {"guidance_scale": 2.0, "negative_prompt": "blue"}, {"controlnet": "rgb", "seed": 7}):
        request = {"seed": 1, "keyframes": keyframes, "num_inference_steps": 2, **size, **options}
        clips = [pipeline.generate("a red boat", **request) for pipeline in (device, host)]
        assert np.abs(clips[0].frames.astype(int) - clips[1].frames).mean() <= 3
        assert (clips[0].frames != clips[1].frames).any(), "fp16 rounds"
    device.close()


def test_runs_never_go_into_a_capture_from_outside(executor: GpuExecutor) -> None:
    """Capturing ONNX Runtime's runs crashes the process. It captures CUDA graphs of its own."""
    pipeline = VideoPipeline(executor.bundle, executor)
    for seed in range(3):
        pipeline.generate("a boat", seed=seed, num_inference_steps=2, **SMALL)
    assert "cudaStreamBeginCapture" not in executor._cuda._api.calls
    unet = executor._workspaces[SMALL_SIZE]._engines["unet"]
    assert len(unet._bindings) == 2, "one graph for each step"
    numbers = [options.get_run_config_entry("gpu_graph_id") for _, options in unet._bindings.values()]
    assert numbers == ["1", "2"]


class Watched:
    """A session that records, for each run, its thread and whether the caller waits until it is done."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.runs: list[tuple[int, bool]] = []

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append((threading.get_ident(), waits_for_run(options)))
        self.session.run_with_iobinding(binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


TEXT_SHAPES = {"input_ids": (1, 77), "attention_mask": (1, 77), "clip_skip": (1,)}
"""The inputs of the text encoder, all int64."""


def watched_encoder(executor: GpuExecutor) -> tuple[Any, list[dict[str, int]], list[Any]]:
    """The engine of the text encoder with a watched session, two sets of addresses, and what keeps their memory."""
    shapes = {**TEXT_SHAPES, "prompt_embeds": (1, 77, 64)}
    size = ClipSize(width=64, height=64, frames=1)
    engine: Any = cuda_backend.OnnxRuntimeCudaLoader().open(
        executor.bundle, "text_encoder", size, shapes, executor._cuda
    )
    engine._session = Watched(engine._session)
    inputs = {name: np.zeros(shape, np.int64) for name, shape in TEXT_SHAPES.items()}
    embeds = [*np.zeros((2, 1, 77, 64), np.float16)]
    known = {name: array.ctypes.data for name, array in inputs.items()}
    return engine, [{**known, "prompt_embeds": each.ctypes.data} for each in embeds], [*inputs.values(), *embeds]


def test_only_the_first_run_with_each_set_of_addresses_is_waited_for(
    executor: GpuExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In it ONNX Runtime warms up and captures. Runs that it neither captures nor replays would not be safe."""
    engine, (one, other), _ = watched_encoder(executor)
    monkeypatch.setattr(cuda_backend, "MAX_GRAPHS", 1)
    for addresses in (one, one, one, other, other):
        engine.enqueue(addresses)
    assert [waits for _, waits in engine._session.runs] == [True, False, False, True, True]
    engine._bindings.clear()
    engine._graphs = False
    for addresses in (one, one):
        engine.enqueue(addresses)
    assert [waits for _, waits in engine._session.runs[5:]] == [True, False]


def test_runs_from_several_threads_are_on_one(executor: GpuExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would not find a CUDA graph that another thread has captured."""
    opened_on: list[int] = []

    def watched(*arguments: Any) -> Any:
        opened_on.append(threading.get_ident())
        return open_without_group_norms(*arguments)

    monkeypatch.setattr(cuda_backend, "_open_session", watched)
    engine, (one, _), _ = watched_encoder(executor)
    engine.enqueue(one)
    caller = threading.Thread(target=engine.enqueue, args=(one,))
    caller.start()
    caller.join()
    (thread,) = {*opened_on, *(thread for thread, _ in engine._session.runs)}
    assert len(engine._session.runs) == 2
    assert thread not in (threading.get_ident(), caller.ident)


def test_a_session_on_other_providers_than_asked_for_is_refused(built: Path) -> None:
    """Without the CUDA provider ONNX Runtime computes on the CPU, and only warns."""
    engines = find_set(built, "onnxruntime-cuda", "fp16")
    assert engines is not None
    reason = "ONNX Runtime opens text_encoder.onnx on CPUExecutionProvider only; see: sparsectrl-lcm doctor"
    with (
        pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available provider names"),
        pytest.raises(BackendError, match=reason),
    ):
        open_session(engines.folder / "text_encoder.onnx", {}, {})


def test_convolutions_have_their_channels_innermost() -> None:
    options = cuda_backend.provider_options(Cuda(EmulatedCudart()), graphs=True)
    assert options["prefer_nhwc"] == "1", "the transposes around group norms cancel those of the convolutions"


def test_more_sets_of_addresses_than_graphs_go_without(executor: GpuExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "MAX_GRAPHS", 1)
    VideoPipeline(executor.bundle, executor).generate("a boat", seed=1, num_inference_steps=2, **SMALL)
    unet = executor._workspaces[SMALL_SIZE]._engines["unet"]
    numbers = [options.get_run_config_entry("gpu_graph_id") for _, options in unet._bindings.values()]
    assert numbers == ["1", "-1"]


def test_a_graph_that_onnxruntime_cannot_capture_runs_plainly(
    executor: GpuExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cuda_backend._open_session

    def refuse(path: Path, dimensions: object, provider: dict[str, str]) -> object:
        if provider["graphs"] == "True" and path.stem == "unet":
            raise BackendError("backend", "nodes have not been partitioned to the CUDA provider")
        return whole(path, dimensions, {})

    monkeypatch.setattr(cuda_backend, "provider_options", lambda cuda, graphs: {"graphs": str(graphs)})
    monkeypatch.setattr(cuda_backend, "_open_session", refuse)
    with caplog.at_level(logging.INFO):
        VideoPipeline(executor.bundle, executor).generate("a boat", seed=1, num_inference_steps=1, **SMALL)
    assert [record.getMessage() for record in caplog.records if "without a CUDA graph" in record.getMessage()]


def test_another_size_needs_no_other_engines(executor: GpuExecutor) -> None:
    clip = VideoPipeline(executor.bundle, executor).generate("a boat", seed=1, width=64, height=192, num_frames=3)
    assert clip.frames.shape == (3, 192, 64, 3)


def test_a_failed_run_is_one_line(executor: GpuExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = cuda_backend.OnnxRuntimeCudaLoader()
    size = ClipSize(width=64, height=64, frames=1)
    shapes = {**TEXT_SHAPES, "prompt_embeds": (1, 77, 32)}
    engine = loader.open(executor.bundle, "text_encoder", size, shapes, executor._cuda)

    class Failing:
        def run_with_iobinding(self, *_: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : CUDA failure 2: out of memory\nmore")

        def __getattr__(self, name: str) -> object:
            return getattr(session, name)

    session, engine._session = engine._session, Failing()
    arrays = {
        name: np.zeros(shape, np.float16 if name == "prompt_embeds" else np.int64) for name, shape in shapes.items()
    }
    with pytest.raises(DeviceOutOfMemory) as error:
        engine.enqueue({name: array.ctypes.data for name, array in arrays.items()})
    assert "\n" not in str(error.value)
    with pytest.raises(BackendError, match="cannot refit; load the other bundle instead"):
        engine.refit([], lambda name: None)


def test_engines_are_asked_for_where_there_are_none(executor: GpuExecutor) -> None:
    bundle = Bundle.load()
    with pytest.raises(BackendError, match="engines were not built; run: sparsectrl-lcm build .* onnxruntime-cuda"):
        cuda_backend.OnnxRuntimeCudaLoader().keyframe_slots(bundle, ClipSize(width=64, height=64, frames=1), 0)


def test_a_precision_that_was_not_built_is_refused(executor: GpuExecutor) -> None:
    assert executor.precision is None
    size = ClipSize(width=64, height=64, frames=1)
    with pytest.raises(BackendError, match=r"fp32 engines were not built; run: .* onnxruntime-cuda --precision fp32$"):
        cuda_backend.OnnxRuntimeCudaLoader("fp32").keyframe_slots(executor.bundle, size, 0)


def test_an_unknown_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(demo_bundle()), "--backend", "onnxruntime-cuda", "--precision", "bf16"]
    assert run(command) == 2
    assert "--precision: 'bf16' is not one of onnxruntime-cuda; allowed are fp16, fp32" in capsys.readouterr().err
