"""Bundles in an object store are fetched once, whole, and deleted when nobody loads them any more."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sparsectrl_lcm.runtime import BundleError
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.objects import object_stores
from sparsectrl_lcm.service.runner import bundle_cache
from sparsectrl_lcm.service.runner.bundle_cache import bundle_manifest, local_bundle
from sparsectrl_lcm.service.runner.pipeline_loading import check_settings
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings

from .stand_in import StandIn
from .waiting import SECONDS


def test_a_bundle_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    monkeypatch.setattr("sparsectrl_lcm.service.runner.bundle_cache.user_cache_path", lambda _: tmp_path)
    store = fsspec.filesystem("memory")
    store.put(f"{demo_bundle()}/", "/bundles/demo/", recursive=True)
    folder = local_bundle("memory://bundles/demo")
    assert folder is not None
    here = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    demo = {path.relative_to(demo_bundle()): path.read_bytes() for path in demo_bundle().rglob("*") if path.is_file()}
    assert here == demo
    store.rm("/bundles/demo/onnx", recursive=True)
    assert local_bundle("memory://bundles/demo") == folder  # the manifest is unchanged
    manifest = store.cat_file("/bundles/demo/manifest.json")
    store.pipe_file("/bundles/demo/manifest.json", manifest + b"\n")
    with pytest.raises(BundleError, match="'onnx/.*' in .* is missing"):
        local_bundle("memory://bundles/demo")
    assert folder.startswith(str(tmp_path))


def test_an_error_does_not_tell_the_password_of_a_store() -> None:
    for read in (local_bundle, bundle_manifest):
        with pytest.raises(BundleError) as refused:
            read("memory://user:secret@none")
        assert refused.value.reason.startswith("memory://none cannot be ")
        assert "secret" not in str(refused.value)


def test_a_server_reads_the_manifest_of_a_url_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For the check of its options and for its endpoint. A fetch reads it again, as the bundle may have changed."""
    import fsspec

    store, read = fsspec.filesystem("memory"), []
    store.pipe_file("/bundles/once/manifest.json", (demo_bundle() / "manifest.json").read_bytes())
    cat = type(store).cat_file
    monkeypatch.setattr(
        type(store), "cat_file", lambda self, path, **more: read.append(path) or cat(self, path, **more)
    )
    settings = Settings(tmp_path, endpoints={"me/once": "memory://bundles/once"})
    check_settings(settings)
    service = open_service(settings, StandIn())
    service.store.close()
    assert read == ["/bundles/once/manifest.json"]
    assert service.endpoints["me/once"].manifest == bundle_manifest(None)


def demo_in_a_store(pause: float, on_piece: Callable[[], None] = lambda: None) -> str:
    """Returns the URL of the demo bundle in a store without sizes, as over http, that pauses within each file."""
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    demo = demo_bundle()

    class Slow(AsyncFileSystem):
        protocol = "slow"
        cachable = False

        async def _find(self, path: str, **_: Any) -> list[str]:
            files = [f"b/{file.relative_to(demo)}" for file in demo.rglob("*") if file.is_file()]
            return [file for file in files if file.startswith(path)]

        async def _cat_file(self, path: str, **_: Any) -> bytes:
            return (demo / path.removeprefix("b/")).read_bytes()

        async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
            content = await self._cat_file(rpath)
            for start in range(0, len(content), size := -(-len(content) // 4)):
                with Path(lpath).open("ab") as file:
                    file.write(content[start : start + size])
                on_piece()
                await asyncio.sleep(pause)

    fsspec.register_implementation("slow", Slow, clobber=True)
    return "slow://b"


@pytest.fixture
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundle_cache, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(bundle_cache, "POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("_own_cache")
def test_a_bundle_may_take_long_while_bytes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    now, get = 0.0, bundle_cache._get

    def go_on() -> None:
        nonlocal now
        now += 0.9 * bundle_cache.SILENT_SECONDS

    def longer_than_a_call(*given: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(object_stores, "CALL_SECONDS", 0.05)
            get(*given)

    monkeypatch.setattr(bundle_cache, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    monkeypatch.setattr(bundle_cache, "_get", longer_than_a_call)
    folder = local_bundle(demo_in_a_store(0.1, go_on))  # each file takes 0.4 s
    assert folder is not None
    assert now > 3 * bundle_cache.SILENT_SECONDS
    assert Path(folder, "manifest.json").read_bytes() == (demo_bundle() / "manifest.json").read_bytes()


@pytest.mark.usefixtures("_own_cache")
def test_a_store_that_falls_silent_while_a_bundle_is_fetched_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_cache, "SILENT_SECONDS", 1.0)
    begun = time.monotonic()
    with pytest.raises(BundleError, match="^bundle: slow://b cannot be fetched: it does not answer; check bucket"):
        local_bundle(demo_in_a_store(SECONDS))
    assert time.monotonic() - begun < SECONDS / 2


def test_a_bundle_that_changes_while_it_is_fetched_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    monkeypatch.setattr("sparsectrl_lcm.service.runner.bundle_cache.user_cache_path", lambda _: tmp_path)
    store = fsspec.filesystem("memory")
    store.put(f"{demo_bundle()}/", "/bundles/changing/", recursive=True)
    first = store.cat_file("/bundles/changing/manifest.json")
    get = type(store).get

    def changed(self: Any, *given: Any, **named: Any) -> None:
        store.pipe_file("/bundles/changing/manifest.json", first + b"\n")
        get(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get", changed)
        with pytest.raises(BundleError, match="changed while it was fetched; start again"):
            local_bundle("memory://bundles/changing")
    store.pipe_file("/bundles/changing/manifest.json", first)  # as after a rollback
    folder = local_bundle("memory://bundles/changing")
    assert folder is not None
    assert Path(folder, "manifest.json").read_bytes() == first
    store.pipe_file("/bundles/changing/manifest.json", first + b"\n")
    os.utime(folder, (0, 0))
    second = local_bundle("memory://bundles/changing")
    assert Path(folder).exists(), "this process uses it"
    bundle_cache._in_use.clear()  # as when the process has ended
    store.pipe_file("/bundles/changing/manifest.json", first + b"\n\n")
    local_bundle("memory://bundles/changing")
    assert not Path(folder).exists()  # nobody has loaded it for a month
    store.pipe_file("/bundles/changing/manifest.json", first + b"\n")
    os.utime(folder := str(second), (0, 0))
    assert local_bundle("memory://bundles/changing") == folder  # loaded now
    store.pipe_file("/bundles/changing/manifest.json", first)
    assert local_bundle("memory://bundles/changing") != folder
    assert Path(folder).exists()
