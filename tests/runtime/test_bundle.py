"""Damaged, foreign and newer bundles."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from sparsectrl_lcm.runtime import BundleError, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.manifest import read_manifest, resolve_shape


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


def refused(bundle: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        Bundle.load(bundle)
    assert "\n" not in str(error.value)


def test_the_demo_bundle_is_small_and_whole() -> None:
    opened = Bundle.load()
    files = [path for path in opened.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.relative_to(opened.folder).as_posix() for path in files} == {"manifest.json", *opened.manifest.files}
    assert (opened.manifest.sizes.width, opened.manifest.sizes.height, opened.manifest.sizes.frames) == (128, 128, 16)


def test_every_file_is_needed(bundle: Path) -> None:
    for name in read_manifest(bundle).files:
        (bundle / name).rename(bundle / "away")
        refused(bundle, f"'{name}' .* is missing; export the bundle again")
        (bundle / "away").rename(bundle / name)
    Bundle.load(bundle)


def test_a_changed_byte_is_found_even_after_a_good_load(bundle: Path) -> None:
    Bundle.load(bundle)
    for name in read_manifest(bundle).files:
        path = bundle / name
        content = path.read_bytes()
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        os.utime(path, ns=times)
        refused(bundle, f"'{name}' .* differs from its checksum")
        path.write_bytes(content[:-1])
        refused(bundle, f"'{name}' .* differs from its checksum")
        path.write_bytes(content)
    Bundle.load(bundle)


def test_a_second_load_reads_no_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bundle.load(bundle)
    monkeypatch.setattr("sparsectrl_lcm.runtime.format.checksums.sha256", lambda path: pytest.fail(f"read {path}"))
    Bundle.load(bundle)


def test_without_a_cache_folder_a_bundle_still_loads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    Bundle.load(bundle)


CHANGES = [
    (lambda m: m.update(version=4), "version 4, this release reads 3; upgrade sparsectrl-lcm"),
    (lambda m: m.update(version=4, novelty={}), "version 4, .* upgrade"),
    (lambda m: m.update(version=0), "version 0, .* export the bundle again"),
    (lambda m: m.update(version="x"), "not a valid manifest"),
    (lambda m: m.update(format="other"), "not a valid manifest"),
    (lambda m: m.pop("sizes"), "sizes: Field required"),
    (lambda m: m.update(novelty=1), "novelty"),
    (lambda m: m["graphs"]["unet"].update(path="../../etc/passwd"), "inside the bundle"),
    (lambda m: m["graphs"]["unet"].update(path="/etc/passwd"), "inside the bundle"),
    (lambda m: m["graphs"]["unet"].update(path="C:/Windows/unet.onnx"), "inside the bundle"),
    (lambda m: m["files"].pop("tokenizer.json"), "no checksum for 'tokenizer.json'"),
    (lambda m: m["files"]["tokenizer.json"].update(sha256="0" * 64), "differs from its checksum"),
    (lambda m: m["scheduler"].update(beta_schedule="cosine"), "beta_schedule"),
    (lambda m: m["scheduler"].update(original_inference_steps=2000), "original_inference_steps"),
    (lambda m: m["trained_for"].update(width=0), "trained_for.width"),
    (lambda m: m["trained_for"].pop("frames"), "trained_for.frames: Field required"),
    (lambda m: m["trained_for"].update(max_keyframes="some"), "trained_for.max_keyframes"),
    (lambda m: m["trained_for"].update(min_keyframes=4), "min_keyframes must be at most max_keyframes"),
    (lambda m: m["trained_for"].update(words=[]), "trained_for.words"),
    (lambda m: m["trained_for"].update(words=["red", "Blue"]), "trained_for.words.1"),
    (lambda m: m.update(trained_for="all"), "trained_for"),
    (lambda m: m["graphs"].pop("unet"), "has no graph 'unet'"),
    (lambda m: m["graphs"].pop("vae_encoder"), "has no graph 'vae_encoder'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_wrong_manifest_is_refused(bundle: Path, change, message: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(bundle, message)


def test_what_a_model_was_trained_for_is_optional_and_changes_no_checksum(bundle: Path) -> None:
    before = read_manifest(bundle)
    assert before.trained_for is not None
    text = re.sub(r'  "trained_for": {.*?\n  },\n', "", (bundle / "manifest.json").read_text(), flags=re.DOTALL)
    (bundle / "manifest.json").write_text(text)
    old = Bundle.load(bundle).manifest
    assert old.trained_for is None
    assert old.checksum == before.checksum
    compact = re.sub(r"\n *", "", text).replace('": ', '":')
    assert old.checksum == hashlib.sha256(compact.encode()).hexdigest(), "as before the field was there"


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path, "has no manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    refused(tmp_path, "not a valid manifest")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    refused(tmp_path, "cannot read")
    refused(tmp_path / ("x" * 256), "cannot read .*: File name too long")
    refused(tmp_path / "manifest.json", "is not a folder")
    refused(tmp_path / "a\0b", "cannot read .*null")
    with pytest.raises(BundleError, match="bundle: 3 is not a path"):
        Bundle.load(3)  # type: ignore[arg-type]


def test_a_bundle_without_a_controlnet_says_so(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in ("controlnet_scribble", "controlnet_rgb"):
        del manifest["graphs"][name]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    pipeline = VideoPipeline.load(bundle, "onnxruntime")
    pipeline.generate("a boat", num_frames=1, num_inference_steps=1)
    from sparsectrl_lcm.runtime import InvalidRequest, Keyframe

    with pytest.raises(InvalidRequest, match="exported without SparseCtrl"):
        pipeline.generate("a boat", [Keyframe(0, b"")], num_frames=1)


def test_symbolic_shapes() -> None:
    sizes = {"batch": 2, "frames": 16, "latent_height": 64}
    assert resolve_shape(("batch*frames", 320, "latent_height/8", "latent_height*8"), sizes) == (32, 320, 8, 512)
