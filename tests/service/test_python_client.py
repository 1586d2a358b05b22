"""fal's own Python client from PyPI, against a running server."""

import contextlib
import io
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import av
import httpx
import pytest

from .conftest import APP, Server
from .documented_programs import HOSTS, blocks, example
from .holds import Hold
from .test_webhooks import Receiver, delivered, verify

SCRIBBLES = Path(__file__).parents[2] / "demo/scribbles"

HEAD = f"""
import json, sys, time
from pathlib import Path
import fal_client
APP = {APP!r}
"""

RESOLVER = """
import socket
port, names = int(sys.argv[1]), sys.argv[2].split()[1:]
find = socket.getaddrinfo
def resolver(host, service, *rest, **more):
    if (host, service) in [(name, 443) for name in names]:
        host, service = "127.0.0.1", port
    return find(host, service, *rest, **more)
socket.getaddrinfo = resolver
"""
"""What a line of /etc/hosts does, and port 443, which only root may use."""


def python(
    server: Server,
    code: str,
    *arguments: str,
    timeout: float = 120,
    environment: Mapping[str, str | None] | None = None,
) -> str:
    """Runs `code` in a process that finds the server only with fal's own variables. None removes a variable."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FAL_")},
        "FAL_KEY": server.key,
        "FAL_RUN_HOST": f"127.0.0.1:{server.tls_port}",
        "FAL_QUEUE_RUN_HOST": f"127.0.0.1:{server.tls_port}/queue",
        "SSL_CERT_FILE": str(server.ca),
        **(environment or {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log[-3000:]
    return done.stdout.strip()


def frames_at(url: str, server: Server) -> int:
    content = httpx.get(url.replace(f"https://127.0.0.1:{server.tls_port}", server.url)).raise_for_status().content
    with av.open(io.BytesIO(content)) as video:
        return sum(1 for _ in video.decode(video=0))


def test_the_hosted_pages_example_gives_a_clip_and_its_seed(demo: Server) -> None:
    code = """
uris = [fal_client.encode_file(path) for path in sys.argv[1:]]
states = []
result = fal_client.subscribe(APP, {
    "prompt": "Masterpiece, best quality, a panda drinking coffee", "controlnet_type": "scribble", "seed": 42,
    "keyframe_0_image_url": uris[0], "keyframe_0_index": 0,
    "keyframe_1_image_url": uris[1], "keyframe_1_index": 8,
    "keyframe_2_image_url": uris[2], "keyframe_2_index": 15,
}, with_logs=True, on_queue_update=states.append)
lines = [line["message"] for line in states[-1].logs]
assert isinstance(states[-1], fal_client.Completed) and "denoise 4/4" in lines, states[-1]
assert result["seed"] == 42 and result["video"]["content_type"] == "video/mp4", result
print(result["video"]["url"])
"""
    url = python(demo, code, *(str(SCRIBBLES / f"frame_{index:02}.png") for index in (0, 8, 15)))
    assert frames_at(url, demo) == 16


def test_the_example_of_the_docs_under_fals_host_names(demo: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIBBLES.parents[1])
    environment = {"FAL_RUN_HOST": None, "FAL_QUEUE_RUN_HOST": None}
    url = python(demo, RESOLVER + example("python", demo), str(demo.tls_port), HOSTS, environment=environment)
    assert frames_at(url.replace("https://queue.fal.run", demo.url), demo) == 16


def test_the_commands_of_the_docs_make_a_clip_on_one_machine(demo: Server, tmp_path: Path) -> None:
    """Hosts other than the server's refuse every connection, as `upload_file` would need one to fal."""
    (tmp_path / "data").symlink_to(demo.data)
    (tmp_path / "demo").symlink_to(SCRIBBLES.parent)
    (tmp_path / "star.py").write_text(example("python", demo))
    (commands,) = [code for code in blocks("sh", demo) if "python star.py" in code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "SSL_"))}
    done = subprocess.run(
        ["bash", "-ec", commands.replace("ID:SECRET", demo.key)],
        cwd=tmp_path,
        env={**kept, "PATH": path, "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + demo.log[-3000:]
    with av.open(tmp_path / "star.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 16


def test_a_wrong_path_of_the_authority_shows_as_documented(demo: Server) -> None:
    code = """
try:
    fal_client.run(APP, {"prompt": "a"})
except Exception as error:
    print(repr(error))
"""
    assert "FileNotFoundError" in python(demo, code, environment={"SSL_CERT_FILE": "data/nope.pem"})


def test_run_stream_queue_and_uploads(demo: Server, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(2**20) * 105)
    code = """
assert fal_client.run(APP, {"prompt": "a", "seed": -1, "num_inference_steps": 1})["seed"] == -1
given = {"prompt": "a", "seed": 5, "num_inference_steps": 2}
events = list(fal_client.stream(APP, given))
assert events[-1]["seed"] == 5 and not any("preview" in event for event in events) and "fraction" in events[0], events
events = list(fal_client.stream(APP, {**given, "sparsectrl_lcm": {"previews": True}}))
assert events[-1]["seed"] == 5 and any("preview" in event for event in events), events
handle = fal_client.submit(APP, {"prompt": "a", "num_inference_steps": 2})
status = handle.status()
assert not isinstance(status, fal_client.InProgress) or status.logs is None
assert [type(event).__name__ for event in handle.iter_events()][-1] == "Completed"
assert handle.get() == fal_client.result(APP, handle.request_id)
print(handle.get()["video"]["url"])
"""
    assert frames_at(python(demo, code), demo) == 16
    module = """
import fal_client.client as client
client.REST_URL = client.CDN_URL = "https://" + __import__("os").environ["FAL_RUN_HOST"]
picture = Path(sys.argv[2])
url = fal_client.upload_file(picture)
assert fal_client.run(APP, {"prompt": "a", "controlnet_type": "rgb", "keyframe_0_image_url": url})["video"]
print(fal_client.upload(picture.read_bytes(), "image/png"))
print(fal_client.upload_file(sys.argv[1]))
"""
    small, large = python(demo, module, str(big), str(SCRIBBLES / "frame_00.png"), timeout=240).splitlines()
    local = f"https://127.0.0.1:{demo.tls_port}"
    assert httpx.get(small.replace(local, demo.url)).content == (SCRIBBLES / "frame_00.png").read_bytes()
    assert httpx.get(large.replace(local, demo.url), timeout=60).content == big.read_bytes()


def test_cancel_and_errors(stub: Server, hold: Hold) -> None:
    code = """
handle = fal_client.submit(APP, {"prompt": sys.argv[1]})
while not isinstance(handle.status(), fal_client.InProgress): time.sleep(0.02)
handle.cancel()
try:
    handle.get()
except fal_client.FalClientHTTPError as error:
    assert (error.status_code, error.error_type) == (499, "client_cancelled"), error
state = handle.status(with_logs=True)
assert isinstance(state, fal_client.Completed) and state.error_type == "client_cancelled", state
assert "denoise 4/4" not in [line["message"] for line in state.logs], state
try:
    handle.cancel()
except fal_client.FalClientHTTPError as error:
    assert error.status_code == 400 and "ALREADY_COMPLETED" in error.message, error
try:
    fal_client.subscribe(APP, {"prompt": "a", "num_inference_steps": 13, "guidance_scale": 1.5})
except fal_client.FalClientHTTPError as error:
    found = {(detail["loc"][-1], detail["type"]) for detail in error.message}
    assert found == {("num_inference_steps", "less_than_equal"), ("guidance_scale", "int_from_float")}, error.message
    print(error.response_headers["x-fal-billable-units"], error.response_headers["x-fal-retryable"])
"""
    assert python(stub, code, hold.prompt) == "0 false"


def test_a_webhook_is_received_and_its_signature_verified(demo: Server, hook: Receiver) -> None:
    code = """
handle = fal_client.submit(APP, {"prompt": "a", "seed": 9, "num_inference_steps": 1}, webhook_url=sys.argv[1])
print(handle.request_id)
"""
    request_id = python(demo, code, hook.url)
    ((headers, body),) = delivered(hook, 1)
    verify(headers, body, httpx.get(demo.url + "/.well-known/jwks.json").json())
    told = json.loads(body)
    assert (told["request_id"], told["status"], told["payload"]["seed"]) == (request_id, "OK", 9)
    assert frames_at(told["payload"]["video"]["url"], demo) == 16


def test_nothing_but_a_proxy_leads_fals_own_hosts_here(stub: Server) -> None:
    code = """
picture = Path(sys.argv[1])
url = fal_client.upload_file(picture)
assert url.startswith("https://v3.fal.media/files/"), url
result = fal_client.subscribe(APP, {"prompt": "a", "seed": 3, "keyframe_0_image_url": url})
assert result["seed"] == 3
print(url)
"""
    with tunnels(stub.tls_port) as (proxy, asked):
        environment = {"FAL_RUN_HOST": None, "FAL_QUEUE_RUN_HOST": None, "HTTPS_PROXY": proxy, "NO_PROXY": None}
        url = python(stub, code, str(SCRIBBLES / "frame_00.png"), environment=environment)
    assert asked == {"rest.fal.ai:443", "v3.fal.media:443", "queue.fal.run:443"}
    local = url.replace("https://v3.fal.media", stub.url)
    assert httpx.get(local).content == (SCRIBBLES / "frame_00.png").read_bytes()


@contextlib.contextmanager
def tunnels(port: int) -> Iterator[tuple[str, set[str]]]:
    """A proxy whose tunnels all end at a port of this machine. Yields its URL and the requested hosts."""
    asked: set[str] = set()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.add(self.rfile.readline().split()[1].decode())
            while self.rfile.readline().strip():
                pass
            with socket.create_connection(("127.0.0.1", port)) as there:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=pump, args=(there, self.connection))
                back.start()
                pump(self.connection, there)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copies all bytes and then the end of the stream."""
    with contextlib.suppress(OSError):  # either side may reset the connection
        while data := source.recv(2**16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def test_a_client_that_waits_no_longer_cancels(stub: Server, hold: Hold) -> None:
    code = """
try:
    fal_client.subscribe(APP, {"prompt": sys.argv[1]}, client_timeout=2, start_timeout=60)
except fal_client.FalClientTimeoutError:
    print("timeout")
"""
    assert python(stub, code, hold.prompt) == "timeout"


def test_a_start_timeout_is_the_users(stub: Server, hold: Hold) -> None:
    code = """
held = fal_client.submit(APP, {"prompt": sys.argv[1]})
try:
    fal_client.submit(APP, {"prompt": "a"}, start_timeout=1.5).get()
except fal_client.FalClientHTTPError as error:
    print(error.status_code, error.error_type, error.response_headers["x-fal-request-timeout-type"])
held.cancel()
"""
    assert python(stub, code, hold.prompt) == "504 startup_timeout user"


@pytest.mark.parametrize("behaviour", ["crash", "hang"])
def test_a_runner_that_dies_fails_one_request_alone(stub: Server, behaviour: str) -> None:
    code = """
try:
    fal_client.subscribe(APP, {"prompt": sys.argv[1]}, headers={"X-Fal-No-Retry": "1"})
except fal_client.FalClientHTTPError as error:
    print(error.status_code)
assert fal_client.run(APP, {"prompt": "a"})
"""
    assert python(stub, code, behaviour) == {"crash": "500", "hang": "504"}[behaviour]
