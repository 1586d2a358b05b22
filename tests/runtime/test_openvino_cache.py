"""What OpenVINO has compiled: kept for the same weights, and its mapped weights given back."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sparsectrl_lcm.runtime import SparseCtrlLcmError
from sparsectrl_lcm.runtime.cpu import compiled_cache, openvino, openvino_compile
from sparsectrl_lcm.runtime.cpu.onnxruntime import OnnxRuntimeSessions
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSessions
from sparsectrl_lcm.runtime.cpu.sessions import Array, Sessions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle


def difference(frames: Array, others: Array) -> int:
    return int(np.abs(frames.astype(int) - others).max())


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo bundle in a folder whose name is not plain."""
    return Path(shutil.copytree(demo_bundle(), tmp_path / "Bündel 1"))


def encode(sessions: Sessions) -> Array:
    """The embeddings of two prompts, by the smallest graph that has weights."""
    sessions.open("text_encoder", {"batch": 2})
    tokens = np.random.default_rng(0).integers(0, 256, (2, 77))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "clip_skip": np.zeros(1, np.int64)}
    (embeddings,) = sessions.session("text_encoder").run(feeds)
    return embeddings


def replace_weights(folder: Path, name: str) -> None:
    """Gives a bundle other weights in place, as an export into the same folder does."""
    path = folder / name
    values = np.fromfile(path, np.float32)
    values[np.abs(values) > 1e-6] *= 1.5  # not the whole numbers among them
    values.tofile(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder without the graphs that other tests compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("with_weights", [True, False])
def test_what_was_compiled_is_kept_for_the_same_weights_only(
    demo: Path, empty_cache: Path, with_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_weights:
        monkeypatch.setattr(openvino, "CACHED_WITH_WEIGHTS", 0)
    folder = empty_cache / "sparsectrl-lcm/openvino"
    first = encode(OpenVinoSessions(Bundle.load(demo)))
    (compiled,) = folder.glob("*.blob")
    assert (encode(OpenVinoSessions(Bundle.load(demo))) == first).all()
    assert list(folder.glob("*.blob")) == [compiled]
    replace_weights(demo, "onnx/text_encoder.weights")
    bundle = Bundle.load(demo)
    expected = encode(OnnxRuntimeSessions(bundle))
    assert np.abs(expected - first).max() > 0.1
    np.testing.assert_allclose(encode(OpenVinoSessions(bundle)), expected, rtol=0, atol=1e-4)


def test_copies_of_a_bundle_share_what_was_compiled(demo: Path, empty_cache: Path, tmp_path: Path) -> None:
    """The second process reads no ONNX graph; a damaged file is compiled again."""
    first = encode(OpenVinoSessions(Bundle.load(demo)))
    copy = Bundle.load(shutil.copytree(demo, tmp_path / "copy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_compile, "_in_fp32", lambda _: pytest.fail("compiled again"))
        assert (encode(OpenVinoSessions(copy)) == first).all()
    (compiled,) = (empty_cache / "sparsectrl-lcm/openvino").glob("*.blob")
    content = compiled.read_bytes()
    for damaged in (content[:1000], content[:-1] + bytes([content[-1] ^ 1]), b""):
        compiled.write_bytes(damaged)
        assert (encode(OpenVinoSessions(copy)) == first).all()
        assert compiled.read_bytes() != damaged


def test_a_nearly_full_disk_keeps_nothing(demo: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "MAX_SHARE", 0.0)
    encode(OpenVinoSessions(Bundle.load(demo)))
    assert list((empty_cache / "sparsectrl-lcm/openvino").iterdir()) == []


@pytest.mark.parametrize("kind", [OnnxRuntimeSessions, OpenVinoSessions])
def test_graphs_are_not_opened_with_weights_that_came_later(kind: Any, demo: Path) -> None:
    """A pipeline opens graphs as requests need them; it must not mix the weights of two bundles."""
    sessions = kind(Bundle.load(demo))
    replace_weights(demo, "onnx/text_encoder.weights")
    with pytest.raises(SparseCtrlLcmError, match="^bundle: .* since the bundle was loaded; load it again") as error:
        sessions.open("text_encoder", {"batch": 2})
    assert "\n" not in str(error.value)


def test_without_a_cache_folder_nothing_is_kept(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))  # as with a home that cannot be written
    bundle = Bundle.load(demo)
    expected = encode(OnnxRuntimeSessions(bundle))
    np.testing.assert_allclose(encode(OpenVinoSessions(bundle)), expected, rtol=0, atol=1e-4)


def resident(folder: Path) -> dict[str, int]:
    """kB of memory that the mapped weights of a folder take in this process."""
    found: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[-1]
        elif line.startswith("Rss:") and name.startswith(str(folder)) and name.endswith(".weights"):
            found[name] = found.get(name, 0) + int(line.split()[1])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not map the weights, or keep them")
def test_mapped_weights_are_given_back(demo: Path, empty_cache: Path) -> None:
    bundle = Bundle.load(demo)
    sessions = OpenVinoSessions(bundle)
    for graph in ("text_encoder", "vae_decoder"):
        sessions.open(graph, {"batch": 1, "images": 1, "latent_height": 8, "latent_width": 8})
    assert sum(resident(demo).values()) == 0
    latents = {"latents": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}
    (frames,) = sessions.session("vae_decoder").run(latents)
    reference = OnnxRuntimeSessions(bundle)
    reference.open("vae_decoder", {})
    assert difference(frames, reference.session("vae_decoder").run(latents)[0]) <= 1
    np.testing.assert_allclose(encode(sessions), encode(reference), rtol=0, atol=1e-4)
