"""The samples in `deploy/`: nginx in front of a server, the systemd units, the container's files."""

import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from command_options import check_options
from sparsectrl_lcm.service.http.local_authority import local_certificate

from .conftest import APP, HERE, Server, missing, ports
from .holds import Hold

ROOT = HERE.parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
PROGRAM = "/opt/sparsectrl-lcm/bin/sparsectrl-lcm"


@pytest.fixture(scope="module")
def nginx(stub: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of nginx with the sample and its lines for https, in front of a server."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx") or missing("nginx")
    folder, port = tmp_path_factory.mktemp("nginx"), ports()[0]
    ca, certificate, key = local_certificate(folder / "tls")
    sample = (DEPLOY / "nginx.conf").read_text()
    for written, here in (
        ("listen 80;", ""),
        ("# listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("# ssl_certificate /etc/letsencrypt/live/clips.example.com/fullchain.pem", f"ssl_certificate {certificate}"),
        ("# ssl_certificate_key /etc/letsencrypt/live/clips.example.com/privkey.pem", f"ssl_certificate_key {key}"),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{stub.port};"),
        ("# location ~ ^/(queue/)?me/portraits", "location ~ ^/(queue/)?me/portraits"),
        ("http://127.0.0.1:8010", f"http://127.0.0.1:{ports()[0]}"),
    ):
        assert sample.count(written) == 1, written
        sample = sample.replace(written, here)
    paths = [f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    http = "\n".join([*paths, "access_log off;", sample])
    main = f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; events {{}}"
    (folder / "nginx.conf").write_text(f"{main}\nhttp {{\n{http}\n}}\n")
    with subprocess.Popen([program, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE, text=True) as process:
        context = ssl.create_default_context(cafile=ca)
        transport = httpx.HTTPTransport(verify=context, retries=6)  # while it starts
        headers = {"Authorization": f"Key {stub.key}"}
        with httpx.Client(
            base_url=f"https://localhost:{port}", transport=transport, headers=headers, timeout=60
        ) as client:
            yield client
        process.terminate()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told


def test_responses_have_the_scheme_and_host_that_clients_call(nginx: httpx.Client) -> None:
    submitted = nginx.post(f"/queue/{APP}", json={"prompt": "a"}).raise_for_status().json()
    assert submitted["status_url"].startswith(f"{nginx.base_url}/queue/{APP}/requests/")
    assert nginx.get(submitted["status_url"]).json()["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")


def test_large_files_pass(nginx: httpx.Client) -> None:
    given = {"file_name": "a.bin", "content_type": "application/octet-stream"}
    upload = nginx.post("/storage/upload/initiate", json=given).raise_for_status().json()
    content = os.urandom(2**20) * 20
    nginx.put(upload["upload_url"], content=content, headers={"Content-Type": given["content_type"]}).raise_for_status()
    assert nginx.get(upload["file_url"]).raise_for_status().content == content
    part = nginx.get(upload["file_url"], headers={"Range": "bytes=3-9"})
    assert (part.status_code, part.content) == (206, content[3:10])


def test_events_arrive_while_the_clip_is_made(nginx: httpx.Client, stub: Server, hold: Hold) -> None:
    with nginx.stream("POST", f"/{APP}/stream", json={"prompt": hold.prompt}) as response:
        request_id = response.headers["x-fal-request-id"]
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        status = f"{stub.queue}/requests/{request_id}/status"
        assert httpx.get(status, headers=stub.headers()).json()["status"] == "IN_PROGRESS"
        hold.let_go()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["video"]["url"].startswith(str(nginx.base_url))


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/queue/metrics", "/queue//metrics//", "/%6detrics"]
)
def test_metrics_are_closed(nginx: httpx.Client, stub: Server, path: str) -> None:
    assert httpx.get(stub.url + "/metrics", headers=stub.headers()).status_code == 200
    assert nginx.get(f"{nginx.base_url}{path}").status_code == 404


@pytest.mark.parametrize(("path", "status"), [("", 502), ("/requests/1/status", 502), ("2", 404)])
def test_a_further_bundle_has_a_server_of_its_own(nginx: httpx.Client, path: str, status: int) -> None:
    for prefix in ("/me/portraits", "/queue/me/portraits"):
        assert nginx.get(f"{prefix}{path}").status_code == status  # 502: no server listens there


def settings_of(unit: Path) -> dict[str, str]:
    text = unit.read_text().replace("\\\n", "")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.M))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_as_systemd_wants_them(unit: Path, tmp_path: Path) -> None:
    check_options(shlex.split(settings_of(unit)["ExecStart"])[1:])
    assert float(settings_of(unit)["TimeoutStopSec"]) > 30 + 3  # drain_seconds, and what uvicorn waits for
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, "/bin/true").replace("User=sparsectrl-lcm", "User=root"))
    done = subprocess.run([verify, "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_a_server_that_says_it_is_ready(tmp_path: Path) -> None:
    settings = settings_of(DEPLOY / "sparsectrl-lcm.service")
    port = str(ports()[0])
    words = shlex.split(
        settings["ExecStart"].replace("8000", port).replace("/var/lib/sparsectrl-lcm", str(tmp_path / "data"))
    )
    assert words[0] == PROGRAM and settings["Type"] == "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        command = [sys.executable, "-m", "sparsectrl_lcm", *words[1:]]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            heard = {"WATCHDOG=1": 0, "READY=1": 0}
            while not all(heard.values()):
                for state in systemd.recv(4096).decode().split("\n"):
                    heard[state] = heard.get(state, 0) + 1
            assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
            process.terminate()
        assert process.returncode == 0


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()]


def test_the_image_is_made_of_what_is_there(stub: Server) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources: set[str] = set()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from="):
            sources |= set(rest.split()[:-1])
    assert sources == known and all((ROOT / source).exists() for source in sources)
    packages = {Path(folder).parts[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert {source.partition("/")[0] for source in sources} >= packages
    of = {name: rest for name, rest in instructions() if name in ("ENTRYPOINT", "CMD", "HEALTHCHECK")}
    assert json.loads(of["ENTRYPOINT"])[0] in project["project"]["scripts"]
    check_options(json.loads(of["CMD"]))
    check = json.loads(of["HEALTHCHECK"].partition("CMD ")[2])
    for port, code in ((stub.port, 0), (ports()[0], 1)):
        command = [sys.executable, *check[1:-1], check[-1].replace("8000", str(port))]
        assert subprocess.run(command, capture_output=True, check=False).returncode == code


def test_images_have_the_extras_that_documented_commands_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [set(rest.removeprefix("EXTRAS=").split(",")) for name, rest in instructions() if name == "ARG"]
    assert len(extras) == sum(".whl)[$EXTRAS]" in rest for _, rest in instructions()) == 2
    on_ray = (ROOT / "docs/ray.md").read_text()
    (built,) = re.findall(r"^docker build .* --build-arg EXTRAS=(\S+) --tag IMAGE .$", on_ray, re.M)
    extras.append(set(built.split(",")))
    assert all(each <= project["optional-dependencies"].keys() for each in extras)
    assert all({"postgresql", "s3"} <= each for each in extras), "docs/deploy.md and docs/ray.md give such URLs"
    manifest = on_ray.partition("```yaml")[2]
    assert all(part in manifest for part in ("--pool, ray", "s3://", "--database, $(DATABASE)")) and "ray" in extras[-1]


@pytest.mark.slow
def test_the_images_first_stage_builds_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from="):
            *sources, target = rest.split()
            for source in sources:
                path = ROOT / source
                place = tmp_path / "source" / target / ("" if path.is_dir() else path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, place)
        if name == "RUN" and "pip wheel" in rest:
            words = shlex.split(rest.replace("/wheels", str(tmp_path / "wheels")))
            command = [sys.executable, *words[1:-1], "--no-build-isolation", "."]
            subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("sparsectrl_lcm-*.whl")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", f"{wheel}[service]"]
    subprocess.run([*command, "--ignore-installed"], check=True, capture_output=True)


def test_the_services_of_compose_fit_together() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    stages = {rest.split(" AS ")[1] for name, rest in instructions() if name == "FROM"}
    bundles: dict[tuple[str | None, ...], str | None] = {}
    for name, service in compose["services"].items():
        if build := service.get("build"):
            context = (DEPLOY / build["context"]).resolve()
            assert context == ROOT and (context / build["dockerfile"]).is_file() and build["target"] in stages
            check_options(service["command"])
            inside = {volume.rpartition(":")[2] for volume in service["volumes"]}
            given = dict(word[2:].split("=") for word in service["command"][1:])
            assert {given["data"], given["files"]} <= inside
            bundle = given.get("bundle")
            queue = given["database"], given.get("endpoint")
            assert bundles.setdefault(queue, bundle) == bundle, f"{name} makes clips for a server with another bundle"
        named = {volume.partition(":")[0] for volume in service["volumes"]}
        assert {volume for volume in named if re.match(r"\w", volume)} <= compose["volumes"].keys(), name
        assert service.get("depends_on", {}).keys() <= compose["services"].keys()
