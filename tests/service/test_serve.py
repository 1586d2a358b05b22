"""`serve` and `keys` with folders and stores that cannot be used: one line, exit code 2, and nothing is left."""

import errno
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fsspec.registry import _registry
from sparsectrl_lcm.cli import run, service_requirements

from .conftest import ports

PROGRAM = [sys.executable, "-u", "-c", "from sparsectrl_lcm.cli import main; main()"]


def refused(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Returns the line on stderr, and checks that stdout is empty."""
    assert run([*map(str, arguments)]) == 2
    said, told = capfd.readouterr()
    assert said == ""
    assert re.fullmatch(r"error: [^\n]+\n", told), told
    return told.removeprefix("error: ").strip()


@pytest.fixture(autouse=True)
def _logs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsectrl_lcm.service.json_logs.log_to_stderr", lambda level: None)


@pytest.fixture
def port() -> str:
    return str(ports()[0])


def test_folders_that_cannot_be_used(capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str) -> None:
    file = tmp_path / "file"
    file.touch()
    for data, why in ((file, "it is a file"), (Path("/proc/x"), "No such file or directory")):
        told = refused(capfd, "serve", "--data", data, "--port", port)
        assert told == f"--data: {data} cannot be used ({why}); give a folder that can be written"
        for command in (["list"], ["create"], ["revoke", "a"]):
            assert f"--data: {data} has no service.sqlite3" in refused(capfd, "keys", *command, "--data", data)


def test_a_folder_whose_name_is_too_long(capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str) -> None:
    data = tmp_path / ("x" * 300)
    told = refused(capfd, "serve", "--data", data, "--port", port)
    assert told == f"--data: {data} cannot be used (File name too long); give a folder that can be written"


def test_keys_of_a_folder_that_may_not_be_read(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def locked(self: Path) -> bool:
        if self.name == "service.sqlite3":  # Python 3.11 raises this if the user may not read the folder
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", locked)
    mend = "give the folder of a server that you may read and write"
    for command in (["list"], ["create"], ["revoke", "a"]):
        told = refused(capfd, "keys", *command, "--data", tmp_path)
        assert told == f"--data: {tmp_path} cannot be used (Permission denied); {mend}"


def filled(folder: Path, names: str) -> Path:
    """A folder with these files."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text({"owner": "0123456789abcdef" * 2, "service.sqlite3": ""}.get(name, "precious"))
    folder.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        "notes.txt",
        "notes.txt work/thesis.txt tmp/x",
        "work/thesis.txt",
        "tmp/x files/x",
        "lock tmp/x",
        "lock notes.txt work/thesis.txt",  # left by a failed start of an earlier release
        "owner/x work/thesis.txt",
    ],
)
def test_a_folder_of_something_else_is_left_as_it_is(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str, names: str
) -> None:
    def state() -> list[tuple[Path, int, bytes]]:
        paths = [data, *sorted(data.rglob("*"))]
        return [(path, path.stat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths]

    data = filled(tmp_path / "home", names)
    before = state()
    told = refused(capfd, "serve", "--data", data, "--port", port, "--files", "nope://x")
    found = re.fullmatch(
        rf"--data: {data} contains '(.*)' and no server created it; give a new or empty folder, .*", told
    )
    assert found is not None, told
    assert (data / found[1]).exists()
    assert state() == before


def test_an_owner_that_is_no_servers(capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str) -> None:
    data = filled(tmp_path / "home", "work/thesis.txt")
    (data / "owner").write_text("Ada Lovelace\n")
    assert "no server created it" in refused(capfd, "serve", "--data", data, "--port", port, "--files", "nope://x")
    assert (data / "work/thesis.txt").exists()


@pytest.mark.parametrize(
    "names",
    [
        "lock",  # a first start whose address was taken,
        "lock service.sqlite3",  # or whose store of files could not be opened,
        "lock files/.parts/x work/x owner.new",  # or that was killed, with its database elsewhere
        "lock owner files/x work/x tmp/x tls/ca.pem notes.txt",  # a server with its database elsewhere
        "lock owner service.sqlite3 work/x tmp/x server.log",
        "service.sqlite3 files/x",  # from a backup
        "lost+found/x",  # a separate disk
        "tls/ca.pem server.log .hidden",  # files that may exist before the first start
    ],
)
def test_a_servers_folder_is_taken_and_emptied_once_all_is_its_own(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str, names: str
) -> None:
    data = filled(tmp_path / "data", names)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = refused(capfd, "serve", "--data", data, "--port", taken.getsockname()[1])
    assert told.endswith("Address already in use; give another host or port")
    assert all((data / name).exists() for name in names.split())
    assert refused(capfd, "serve", "--data", data, "--port", port, "--files", "nope://x").startswith("--files: nope")
    left = [name for name in names.split() if not name.startswith(("work/", "tmp/"))]
    assert [name for name in names.split() if (data / name).exists()] == left
    assert data.stat().st_mode & 0o777 == 0o700


def test_keys_make_no_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "a b"
    for command in (["list"], ["create"], ["revoke", "a"]):
        told = refused(capfd, "keys", *command, "--data", data)
        assert told.endswith(f"or make one with: sparsectrl-lcm serve --data '{data}'")
    assert not data.exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--database=mysql://u:secret@h/x", "--database: mysql:// is not supported; give postgresql://"),
        ("--database=nope secret", "--database: the value is not a URL; give postgresql://"),
        ("--files=nope://x", "--files: nope:// cannot be opened (Protocol not known: nope)"),
    ],
)
def test_stores_that_are_unknown(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str, option: str, told: str
) -> None:
    said = refused(capfd, "serve", "--data", tmp_path, "--port", port, option)
    assert said.startswith(told) and "secret" not in said
    if option.startswith("--database"):
        assert refused(capfd, "keys", "list", "--data", tmp_path, option).startswith(told)


def test_packages_that_are_missing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("psycopg", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # another test may have loaded it
    command = ("serve", "--data", tmp_path / "data", "--port", port)
    told = refused(capfd, *command, "--database", "postgresql://h/x")
    assert told.startswith("--database: postgresql:// needs psycopg (")
    assert told.endswith("; run: pip install 'sparsectrl-lcm[service,postgresql]'")
    told = refused(capfd, *command, "--files", "s3://bucket")
    assert told.startswith("--files: s3:// cannot be opened (") and told.endswith("; run: pip install s3fs")
    missing = ("fastapi", "sqlalchemy")
    monkeypatch.setattr(service_requirements, "find_spec", lambda name: None if name in missing else name)
    for needing in (("serve",), ("keys", "list"), ("keys", "create"), ("keys", "revoke", "a")):
        told = refused(capfd, *needing, "--data", tmp_path / "data")
        assert told == f"{needing[0]} needs fastapi, sqlalchemy; run: pip install 'sparsectrl-lcm[service]'"


def test_a_database_that_does_not_answer(capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str) -> None:
    url = f"postgresql://u:secret@127.0.0.1:{ports()[0]}/x"
    told = refused(capfd, "serve", "--data", tmp_path, "--port", port, "--database", url)
    assert told.startswith("database postgresql://u:***@127.0.0.1:") and "refused" in told
    (tmp_path / "service.sqlite3").write_text("no database, but as long as the head of one would have to be" * 20)
    assert "file is not a database" in refused(capfd, "keys", "list", "--data", tmp_path)


def test_an_address_that_is_taken(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for data in (tmp_path, tmp_path / "new/data"):
            told = refused(capfd, "serve", "--data", data, "--port", port)
            assert told == f"127.0.0.1:{port}: Address already in use; give another host or port"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("option", ["--database=mysql://h/x", "--files=nope://x", "--allow-private=a/b"])
def test_a_refused_start_leaves_no_folder(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, port: str, option: str
) -> None:
    refused(capfd, "serve", "--data", tmp_path / "new/data", "--port", port, option)
    assert not list(tmp_path.iterdir())


def test_what_only_the_runner_finds_out(tmp_path: Path, port: str) -> None:
    command = ["serve", "--data", str(tmp_path / "new/data"), "--port", port]
    command += ["--backend", "onnxruntime", "--precision", "fp8"]
    done = subprocess.run([*PROGRAM, *command], capture_output=True, text=True, timeout=60, check=False)
    wanted = "error: --precision: onnxruntime computes in fp32 on the CPU; 'fp8' is for tensorrt, tensorrt-rtx\n"
    assert (done.returncode, done.stderr) == (2, wanted)
    assert "API key is" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(tmp_path: Path) -> "Iterator[tuple[subprocess.Popen[str], Path, str]]":
    data, (port, tls_port, _) = tmp_path / "data", ports()
    command = [*PROGRAM, "serve", "--data", str(data), "--port", str(port), "--tls-port", str(tls_port)]
    command += ["--backend", "onnxruntime"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process, data, f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_the_greeting_and_the_keys(
    capfd: pytest.CaptureFixture[str], server: "tuple[subprocess.Popen[str], Path, str]"
) -> None:
    process, data, url = server
    assert process.stdout is not None
    trust, page, told = (process.stdout.readline().strip() for _ in range(3))
    assert trust.startswith(f"https clients have to trust {data}/tls/ca.pem")
    assert told == f"a first API key is in {data}/first-key; delete the file when you have it"
    assert page == f"{url}/ loads the model; a first API key follows"
    assert httpx.get(url).status_code == 200
    assert (data / "first-key").stat().st_mode & 0o777 == 0o600
    key = (data / "first-key").read_text().strip()
    assert httpx.get(f"{url}/metrics").status_code == 401
    for scheme in ("Key", "Bearer"):  # Prometheus sends either
        assert httpx.get(f"{url}/metrics", headers={"Authorization": f"{scheme} {key}"}).status_code == 200
    told = refused(capfd, "serve", "--data", data, "--port", ports()[0])
    assert told == f"--data: another server uses {data}; give another folder, or end that server"

    key_id = key.partition(":")[0]
    told = refused(capfd, "keys", "revoke", "nope", "--data", data)
    assert told == f"there is no key 'nope'; see them with: sparsectrl-lcm keys list --data {data}"
    for wanted in (r"revoked", rf"{key_id} was already revoked at [\d: -]+"):
        assert run(["keys", "revoke", key_id, "--data", str(data)]) == 0
        assert re.fullmatch(wanted, capfd.readouterr().out.strip())
