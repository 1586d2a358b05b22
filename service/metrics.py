"""The metrics of a server, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts and times of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry, "namespace": "sparsectrl_lcm"}
        self.unstored = Gauge("clips_unstored", "Clips that are made but not stored yet.", **named)
        self.webhooks = Counter("webhook_deliveries", "Attempts to deliver.", ["result"], **named)
        runner, timed = ["endpoint", "runner"], {"buckets": SECONDS} | named
        self.waiting = Gauge("queue_depth", "Requests that wait.", ["endpoint"], **named)
        self.running = Gauge("running", "Requests that run.", ["endpoint"], **named)
        self.ready = Gauge("runner_ready", "1 if the runner has a model loaded.", runner, **named)
        self.busy = Gauge("runner_busy", "1 if the runner has a job.", runner, **named)
        self.clips = Counter("runner_clips", "Clips that the runner made.", runner, **named)
        self.submitted = Counter("requests_submitted", "Requests that were accepted.", ["endpoint", "kind"], **named)
        self.ended = Counter("requests_ended", "Requests that ended, by HTTP status.", ["endpoint", "status"], **named)
        lost = "Attempts that ended because the process of a runner crashed, hung or could not load."
        self.lost = Counter("runner_lost", lost, [*runner, "kind"], **named)
        self.wait = Histogram("queue_wait_seconds", "From submission to start.", ["endpoint"], **timed)
        self.total = Histogram("clip_seconds", "From start to the stored clip.", ["endpoint"], **timed)
        self.stages = Histogram("stage_seconds", "Stages of a clip.", ["endpoint", "stage"], **timed)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
