"""The service in a process of its own, forked from one that has imported it: the imports take most of a start."""

import asyncio
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([f"sparsectrl_lcm.service.{name}" for name in ("server", "http.local_authority")])


def start_server(ports: tuple[int, int, int], data: Path, log: Path, path: Path, **options: Any) -> BaseProcess:
    """Starts `serve` with a plain listener, one for the queue and one with TLS.

    Args:
        ports: of the three listeners.
        data: the data folder.
        log: the file to which the server's output is appended.
        path: a folder from which the runner's process can import.
        options: more settings.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    process = FORKED.Process(target=_main, args=(ports, data, log, environment, options), daemon=True)
    process.start()
    return process


def _main(
    ports: tuple[int, int, int], data: Path, log: Path, environment: dict[str, str], options: dict[str, Any]
) -> None:
    os.setsid()
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from sparsectrl_lcm.service.http.listeners import Listener
    from sparsectrl_lcm.service.http.local_authority import local_certificate
    from sparsectrl_lcm.service.http.tls_certificates import Certificate
    from sparsectrl_lcm.service.json_logs import log_to_stderr
    from sparsectrl_lcm.service.routes import monitoring
    from sparsectrl_lcm.service.server import serve
    from sparsectrl_lcm.service.settings import Settings

    port, queue_port, tls_port = ports
    settings = Settings(data=data, queue_port=queue_port, tls_port=tls_port, **options)
    log_to_stderr("info")
    monitoring.STALE_SECONDS = 60.0  # a busy machine may hold up the periodic work for long
    tls = Listener("127.0.0.1", tls_port, Certificate(lambda: local_certificate(settings.data / "tls")[1:]))
    asyncio.run(serve(settings, [Listener("127.0.0.1", port), Listener("127.0.0.1", queue_port), tls]))
