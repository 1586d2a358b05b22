"""The settings of the service, with their defaults."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..runtime.errors import InvalidRequest, SparseCtrlLcmError, shown

SQLITE = "service.sqlite3"
MIB = 2**20
_ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?")
DEFAULT_ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
"""The name of a server that is given no other, and of requests from before the database recorded it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TAKEN = {"api", "comfy", "docs", "files", "page", "queue", "storage", "tokens", "workflows"}
"""First parts of paths that have another meaning, here or in fal's clients."""
DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service runs. Sizes are in bytes, times in seconds.

    Attributes:
        data: folder for everything that outlives the process.
        database: SQLAlchemy URL; None means SQLite in `data`.
        files: fsspec URL for uploads and clips; None means a folder in `data`.
        public_url: scheme and authority of the URLs in responses; None means those that the caller used.
        endpoints: the names that clients call, each with its bundle: a folder, or the URL of an object store, from
            which each machine fetches it once; None means the demo bundle. Each has a queue, which all servers with
            this endpoint on one database share.
        anonymous: whether to accept calls without a key.
        docs: whether to serve Swagger UI at /docs.
        extensions: whether inputs may have the fields of `ExtendedInput`.
        allow_private: host names, addresses or networks that keyframe and webhook URLs may reach even if not public.
        backend, precision, threads: as for `VideoPipeline.load`; without `threads` the server keeps a core.
        warm: width and height that runners warm up for before they are ready.
        weights: other bundles by endpoint and by the name with which requests ask for their weights; given as in
            `endpoints`.
        pool: `local`, or `ray`: runners on a Ray cluster.
        devices, runners: of the local pool of each endpoint; as `runner_devices` takes them.
        ray_address, replicas, gpus_per_replica: of Ray: as `RayPool` takes them; `replicas` is MIN..MAX.
        pipeline: `module:callable` that creates the pipeline.
        queue_port: port on which every POST to the endpoint is a submission; None means prefix and host name decide.
        tls_port: port for https, which the page shows.
        body_bytes: largest JSON body.
        upload_bytes, part_bytes: largest uploaded file, and part of one.
        uploads, key_uploads: most uploads, parts and large inputs that arrive at once, in total and of one key. Four
            times as many wait, for `body_seconds`; others are refused with 429.
        key_bytes: most bytes that are stored for one key: its uploads, its clips, and the inputs of its requests that
            have not ended. A file counts 64 KiB more than it has. Clips are stored even if they exceed it.
        image_bytes, image_pixels: largest keyframe.
        image_seconds: longest time to read the keyframes of a request.
        prompt_characters: longest prompt.
        clip_pixels: largest clip that `extensions` may ask for: width times height times frames.
        key_queue: most waiting requests of one key.
        queue: most waiting requests in total.
        fetch_seconds, fetch_redirects: limits for the download of a keyframe.
        connections, address_connections: most connections of a listener at once, in total and of one address. When
            full, the one that has been idle longest ends.
        header_seconds: longest time for the head of an HTTP request to arrive.
        body_seconds: longest silence within a body.
        step_seconds: longest silence of the runner during a job; after that it counts as hung.
        start_seconds: longest time for the runner to load.
        retries: how often a request is tried again after its runner died.
        lease_seconds: longest time without a renewal; after that another machine takes over a request.
        object_seconds: lifetime of files if the caller does not set one; None keeps them for ever.
        most_object_seconds: longest lifetime of files that a caller may set; longer ones are shortened.
        request_seconds: how long results are kept.
        private_seconds: how long they are kept if the caller asked for no storage.
        webhook_attempts: most attempts to deliver a webhook; the waits double from 1 s up to `webhook_wait_seconds`.
        webhook_seconds: longest wait for a webhook's response.
        drain_seconds: at shutdown, time for the running request to finish.
        key_unstarted: most requests of one key per hour that end without a start: wrong, late or cancelled.
        free_bytes: least free space on the disk of `data`; with less, uploads and requests are refused.

    Raises:
        InvalidRequest: a value is not allowed.
    """

    data: Path
    database: str | None = None
    files: str | None = None
    public_url: str | None = None
    endpoints: Mapping[str, Path | str | None] = field(default_factory=lambda: {DEFAULT_ENDPOINT: None})
    anonymous: bool = False
    docs: bool = False
    extensions: bool = False
    allow_private: tuple[str, ...] = ()

    backend: str = "auto"
    precision: str | None = None
    threads: int | None = None
    warm: tuple[int, int] | None = None
    weights: Mapping[str, Mapping[str, Path | str]] = field(default_factory=dict)
    pool: str = "local"
    devices: tuple[str, ...] = ()
    runners: int = 1
    ray_address: str = "auto"
    replicas: str = "1"
    gpus_per_replica: float = 1.0
    pipeline: str = "sparsectrl_lcm.service.runner.pipeline_loading:load"

    queue_port: int | None = None
    tls_port: int | None = None
    body_bytes: int = 12 * MIB
    upload_bytes: int = 512 * MIB
    part_bytes: int = 128 * MIB
    uploads: int = 64
    key_uploads: int = 8
    key_bytes: int = 20 * 1024 * MIB
    image_bytes: int = 20 * MIB
    image_pixels: int = 16_000_000
    image_seconds: float = 20.0
    prompt_characters: int = 10_000
    clip_pixels: int = 33_554_432
    key_queue: int = 1000
    queue: int = 10_000
    fetch_seconds: float = 20.0
    fetch_redirects: int = 3
    connections: int = 2000
    address_connections: int = 1000
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    step_seconds: float = 600.0
    start_seconds: float = 900.0
    retries: int = 1
    lease_seconds: float = 30.0
    object_seconds: float | None = 7 * DAY
    most_object_seconds: float = 365 * DAY
    request_seconds: float = 7 * DAY
    private_seconds: float = 3600.0
    webhook_attempts: int = 12
    webhook_wait_seconds: float = 900.0
    webhook_seconds: float = 15.0
    drain_seconds: float = 30.0
    key_unstarted: int = 2000
    free_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        for endpoint in self.endpoints:
            owner, _, alias = endpoint.partition("/")
            if not (_NAME.fullmatch(owner) and _NAME.fullmatch(alias)) or owner in TAKEN or len(endpoint) > 255:
                reason = f"{endpoint!r} is not allowed"
                raise InvalidRequest("endpoint", reason, "give OWNER/NAME, such as me/portraits")
        if self.public_url is not None and not _ORIGIN.fullmatch(self.public_url):
            reason = f"{self.public_url!r} is not allowed"
            raise InvalidRequest("public_url", reason, "give http(s)://HOST or http(s)://HOST:PORT")
        for name, kind in LIMITS.items():
            value = getattr(self, name)
            if value is None and kind == float | None:
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                least = "0 or more" if name in _MAY_BE_ZERO else "more than 0"
                raise InvalidRequest(name, f"{value} is not allowed", f"give {least}")

    def of_endpoint(self, error: SparseCtrlLcmError, endpoint: str) -> SparseCtrlLcmError:
        """Returns the error of an endpoint's bundle: with its name, if there are several, as `endpoint` gives both."""
        if len(self.endpoints) == 1:
            return error
        return type(error)(
            "endpoint" if error.field == "bundle" else error.field, f"{endpoint}: {error.reason}", error.remedy
        )

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of requests, logs and keys."""
        return self.database or f"sqlite:///{self.data / SQLITE}"

    @property
    def files_url(self) -> str:
        """Path or URL of uploads and clips."""
        return self.files or str(self.data / "files")

    @property
    def work(self) -> Path:
        """Folder for the files of runner and jobs; emptied at every start."""
        return self.data / "work"

    @property
    def incoming(self) -> Path:
        """Folder for bodies while they arrive; emptied at every start."""
        return self.data / "tmp"


LIMITS = {
    each.name: each.type
    for each in fields(Settings)
    if each.type in (int, float, float | None) and each.name not in ("runners", "gpus_per_replica")
}
"""Sizes, times and counts, which `with_limits` may change."""
_MAY_BE_ZERO = {
    "drain_seconds",
    "fetch_redirects",
    "free_bytes",
    "private_seconds",
    "request_seconds",
    "retries",
    "webhook_attempts",
    "webhook_wait_seconds",
}


def with_limits(settings: Settings, given: Iterable[str]) -> Settings:
    """Returns the settings with changed sizes, times and counts, each given as NAME=VALUE. `none` removes a limit.

    Raises:
        InvalidRequest: a name is unknown, or its value is not allowed.
    """
    values: dict[str, int | float | None] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not (separator and name):
            raise InvalidRequest(text, "not allowed", "give NAME=VALUE, such as queue=100")
        if name not in LIMITS:
            raise InvalidRequest(name, "unknown", f"there are {', '.join(LIMITS)}")
        values[name] = _number(name, value)
    return replace(settings, **values)  # type: ignore[arg-type]


def _number(name: str, text: str) -> int | float | None:
    kind = LIMITS[name]
    if kind == float | None and text.lower() == "none":
        return None
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        remedy = f"give {what} or none" if kind == float | None else f"give {what}"
        raise InvalidRequest(name, f"{shown(text)} is not allowed", remedy) from None
