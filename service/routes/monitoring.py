"""Health, readiness and metrics, for operators of the service."""

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ..auth.callers import KeyId
from ..components import CurrentService
from ..protocol.responses import Json
from ..runner import Runner

STALE_SECONDS = 5.0
"""Longest time without periodic work, which happens each second, before the server counts as not ready."""
router = APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """Returns 200 while the process answers."""
    return Json({"status": "ok"})


@router.get("/readyz")
async def readyz(service: CurrentService) -> Response:
    """Returns 200 and the state of each endpoint once all have loaded a model, while the database answers.

    An endpoint that loses its model later makes the server unready only if no other has one: its requests wait for the
    next model, and those of the others need this server. Needs no key, so it shows no paths or process ids.
    """
    if service.draining:
        return Json({"status": "draining"}, 503)
    problem = service.database_problem or service.owner_lock.problem
    if problem is None and time.monotonic() - service.answered_at > STALE_SECONDS:
        problem = "the database does not answer"
    if problem is not None:
        return Json({"status": "failed", "problem": problem}, 503)
    endpoints = {name: _readiness(endpoint.runner) for name, endpoint in service.endpoints.items()}
    states = {endpoint["status"] for endpoint in endpoints.values()}
    loaded = all(endpoint.runner.about for endpoint in service.endpoints.values())
    order = ("ready", "failed", "loading") if loaded else ("failed", "loading", "ready")
    status = next(state for state in order if state in states)
    return Json({"status": status, "endpoints": endpoints}, 200 if status == "ready" else 503)


def _readiness(runner: Runner) -> dict[str, Any]:
    """Returns the state of an endpoint: what it runs, or why it does not."""
    runners = {"runners": [{k: v for k, v in asdict(status).items() if v is not None} for status in runner.runners]}
    if not runner.capacity:
        state = {"status": "failed", "problem": runner.problem} if runner.problem else {"status": "loading"}
        return state | runners
    about = {name: value for name, value in runner.about.items() if name not in ("bundle", "pid")}
    return {"status": "ready", **about, **runners}


@router.get("/metrics")
async def metrics(service: CurrentService, _: KeyId) -> Response:
    """Returns the metrics in Prometheus' text format to the holders of a key."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
