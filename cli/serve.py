"""`sparsectrl-lcm serve`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..service.settings import DEFAULT_ENDPOINT
from .serve_greeting import ANY, Greeting
from .service_requirements import database_errors, need_service

if TYPE_CHECKING:
    from ..service.http.listeners import Listener

LEVELS = ("debug", "info", "warning", "error")
FILES = 16_384
"""Files that the process may have open at once, if the system allows it."""


def serve(
    data: Annotated[Path, typer.Option(help="Folder for requests, files and keys; created if missing.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Plain http: the page, runs, storage, and the queue under /queue.")] = 8000,
    queue_port: Annotated[
        int | None, typer.Option(help="Plain http; here a POST to the endpoint goes into the queue.")
    ] = None,
    tls_port: Annotated[int | None, typer.Option(help="https; fal's Python client needs it.")] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file; by default the server makes one, signed by DATA/tls/ca.pem.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    public_url: Annotated[
        str | None, typer.Option(help="Scheme and host of URLs in responses; the caller's by default.")
    ] = None,
    database: Annotated[str | None, typer.Option(help="postgresql://...; SQLite in DATA by default.")] = None,
    files: Annotated[str | None, typer.Option(help="fsspec URL such as s3://bucket; DATA/files by default.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Accept calls without a key.")] = False,
    allow_private: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST|NETWORK", help="Private, but keyframe and webhook URLs may reach it; repeatable."),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="A folder from `export`, or its fsspec URL; the demo bundle by default.")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OWNER/NAME[=BUNDLE]",
            help=f"The name that clients call, {DEFAULT_ENDPOINT} by default; repeatable, each with its bundle.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="As for `generate`.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a runner on the CPU; all cores but one.")] = None,
    warm: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the clips to warm up for before the server is ready.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[OWNER/NAME:]NAME=BUNDLE",
            help="Other LoRAs or motion module, for requests that name them; repeatable.",
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="A runner for each: cuda:0,cuda:1 or auto for every GPU; cpu; OpenVINO's names.")
    ] = None,
    runners: Annotated[int, typer.Option(help="Without --devices: runners that share the cores of the CPU.")] = 1,
    pool: Annotated[str, typer.Option(help="local, or ray: runners on a Ray cluster.")] = "local",
    ray_address: Annotated[str, typer.Option(help="Ray's cluster: auto, or HOST:PORT of its head.")] = "auto",
    replicas: Annotated[str, typer.Option(metavar="MIN..MAX", help="Runners on Ray; they follow the queue.")] = "1",
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs of a runner on Ray; 0 for the CPU.")] = 1.0,
    limits: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A limit from docs/service.md; repeatable."),
    ] = None,
    extensions: Annotated[
        bool, typer.Option("--extensions", help="Inputs may have num_frames, width, height, fps and output_format.")
    ] = False,
    docs: Annotated[bool, typer.Option("--docs", help="Swagger UI at /docs.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve fal's protocol over HTTP, and a page at /."""
    need_service("serve")
    import asyncio

    from ..runtime import InvalidRequest
    from ..service.json_logs import log_to_stderr
    from ..service.runner.pipeline_loading import check_settings
    from ..service.server import serve
    from ..service.settings import Settings, with_limits
    from .options import endpoint_weights, parse_endpoints, parse_size

    if log_level not in LEVELS:
        raise InvalidRequest("log_level", f"{log_level!r} is not allowed", f"give {', '.join(LEVELS)}")
    ports = _ports(port=port, queue_port=queue_port, tls_port=tls_port)
    chosen = tuple(name.strip() for name in devices.split(",")) if devices is not None else ()
    endpoints = parse_endpoints(endpoint or (), bundle)
    settings = Settings(
        data=data,
        public_url=public_url,
        database=database,
        files=files,
        anonymous=anonymous,
        docs=docs,
        extensions=extensions,
        allow_private=tuple(allow_private or ()),
        queue_port=queue_port,
        tls_port=tls_port,
        endpoints=endpoints,
        backend=backend,
        precision=precision,
        threads=threads,
        warm=None if warm is None else parse_size(warm, "warm"),
        weights=endpoint_weights(weights or (), endpoints),
        devices=chosen,
        runners=runners,
        pool=pool,
        ray_address=ray_address,
        replicas=replicas,
        gpus_per_replica=gpus_per_replica,
    )
    try:
        settings = with_limits(settings, limits or ())
    except InvalidRequest as error:
        raise InvalidRequest(f"--set {error.field}", error.reason, error.remedy) from None
    listeners = _listeners(data, host, ports, public_url, tls_certificate, tls_key)
    check_settings(settings)
    greeting = Greeting(listeners[0], tls_port is not None and tls_certificate is None)
    _allow_connections()
    log_to_stderr(log_level)
    with database_errors(settings.database_url):
        asyncio.run(serve(settings, listeners, on_open=greeting.opened, on_loaded=greeting.loaded))


def _ports(**given: int | None) -> dict[str, int]:
    """Returns the given ports by option name.

    Raises:
        InvalidRequest: one is not a TCP port, or two are the same.
    """
    from ..runtime import InvalidRequest

    ports: dict[str, int] = {}
    for name, port in given.items():
        option = f"--{name.replace('_', '-')}"
        if port is None:
            continue
        if not 1 <= port <= 65_535:
            raise InvalidRequest(name, f"{port} is not allowed", "give 1 to 65535")
        if port in ports.values():
            other = next(known for known, taken in ports.items() if taken == port)
            raise InvalidRequest(name, f"{port} is already the port of {other}", "give another port")
        ports[option] = port
    return ports


def _allow_connections() -> None:
    """Raises the limit of open files: each connection is one, and many systems allow more only on request."""
    if sys.platform == "win32":
        return
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _listeners(
    data: Path, host: str, ports: dict[str, int], public_url: str | None, certificate: Path | None, key: Path | None
) -> list["Listener"]:
    from urllib.parse import urlsplit

    from ..runtime import InvalidRequest
    from ..service.http.listeners import Listener
    from ..service.http.local_authority import local_certificate
    from ..service.http.tls_certificates import Certificate

    if (certificate is None) != (key is None):
        reason = "--tls-certificate and --tls-key go together"
        raise InvalidRequest("", reason, "give both, or neither for a local certificate")
    if certificate is not None and key is not None:
        files = (certificate, key)
        tls = Certificate(lambda: files)
        tls.context()  # wrong files are told before anything starts
    else:
        public = urlsplit(public_url or "").hostname
        names = tuple(name for name in (host, public) if name and name not in ANY)
        tls = Certificate(lambda: local_certificate(data / "tls", names)[1:])
    return [Listener(host, port, tls if option == "--tls-port" else None) for option, port in ports.items()]
