"""Ray's options, and clusters that cannot be joined."""

import math
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import BackendError, InvalidRequest
from sparsectrl_lcm.service.runner.make_runners import check_pool
from sparsectrl_lcm.service.runner.ray_cluster import join_cluster
from sparsectrl_lcm.service.settings import Settings

from .conftest import ports


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pool": "slurm"}, "pool: 'slurm' is not allowed; give local or ray"),
        ({"replicas": "2..1"}, "replicas: '2..1' is not allowed; give MIN..MAX, such as 1..8, or a number"),
        ({"pool": "ray", "runners": 2}, "runners: not allowed with Ray, which places the replicas; give replicas"),
        (
            {"pool": "ray", "ray_address": "ray://head:10001"},
            "ray_address: Ray's client protocol cannot stream progress",
        ),
        ({"replicas": "1..2"}, "replicas: only for runners on Ray; give pool ray, or leave it out"),
        ({"gpus_per_replica": -1.0}, "gpus_per_replica: -1 is not allowed; give 0 to 1, or a whole number"),
        ({"gpus_per_replica": 1.5}, "gpus_per_replica: 1.5 is not allowed; give 0 to 1, or a whole number"),
        ({"gpus_per_replica": math.nan}, "gpus_per_replica: nan is not allowed; give 0 to 1, or a whole number"),
        ({"gpus_per_replica": math.inf}, "gpus_per_replica: inf is not allowed; give 0 to 1, or a whole number"),
    ],
)
def test_wrong_settings(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_pool(Settings(tmp_path, **given))
    assert str(caught.value).startswith(told)


def test_a_local_batch_takes_no_options_of_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["batch", "none.jsonl", "-o", str(tmp_path / "out"), "--replicas", "2"]) == 2
    assert "--replicas: only for runners on Ray; give pool ray, or leave it out" in capsys.readouterr().err


def test_without_a_cluster_it_ends_in_one_line(tmp_path: Path) -> None:
    port = ports()[0]
    given = ["serve", "--data", str(tmp_path / "data"), "--port", str(ports()[1]), "--pool", "ray"]
    command = [sys.executable, "-m", "sparsectrl_lcm", *given, "--ray-address", f"127.0.0.1:{port}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    told = f"no Ray cluster at 127.0.0.1:{port} ([Errno 111] Connection refused); start one: ray start --head"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: --ray-address: {told}")


def test_a_head_that_wants_a_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(error: Exception) -> str:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", Mock(side_effect=error))
        with closing(socket.create_server(("127.0.0.1", 0))) as head, pytest.raises(BackendError) as caught:
            join_cluster(f"127.0.0.1:{head.getsockname()[1]}")
        return str(caught.value)

    told = refuse(ConnectionError("Failed to connect to Ray cluster at 127.0.0.1"))
    assert "did not let this process in (Failed to connect to Ray cluster" in told
    assert told.endswith("set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the one of its head")
    assert "RAY_AUTH_TOKEN" in refuse(ray.exceptions.AuthenticationError("No token was found. Do"))
