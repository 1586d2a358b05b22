"""Errors of the service, in the two shapes that fal's clients read."""

from typing import Any

from .store import Outcome

DOCS = "https://docs.fal.ai/errors/#"

STATUS_OF_TYPE = {
    "bad_request": 400,
    "client_disconnected": 499,
    "client_cancelled": 499,
    "runner_server_error": 500,
    "internal_error": 500,
    "runner_scheduling_failure": 503,
}
"""The HTTP status of fal's infrastructure errors."""


class ServiceError(Exception):
    """An answer that is not a success.

    Args:
        status: of HTTP.
        detail: one line, or fal's list of fields.
        error_type: fal's name of an infrastructure error, sent in the body and as a header.
        headers: added to the answer.
        body: sent instead of `detail`, for the few answers of fal that have another shape.
    """

    def __init__(
        self,
        status: int,
        detail: str | list[dict[str, Any]],
        error_type: str | None = None,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail if isinstance(detail, str) else detail[0]["msg"])
        self.status = status
        self.error_type = error_type
        self.body = body or {"detail": detail} | ({"error_type": error_type} if error_type else {})
        self.headers = headers_of(status, self.body) | (headers or {})


def headers_of(status: int, body: Any) -> dict[str, str]:
    """The headers of a result, whether it is answered at once or asked for later.

    An error of the model is fal's list of fields; those with a status of 500 and more may be gone at the next attempt.
    """
    detail = body.get("detail") if isinstance(body, dict) and status >= 400 else None
    if isinstance(detail, list) and detail:
        retryable = "true" if status >= 500 else "false"
        return {"X-Fal-Error-Type": detail[0]["type"], "X-Fal-Billable-Units": "0", "X-Fal-Retryable": retryable}
    error_type = body.get("error_type") if detail is not None else None
    headers = {"X-Fal-Error-Type": str(error_type)} if error_type else {}
    if error_type == "startup_timeout":
        headers["X-Fal-Request-Timeout-Type"] = "user"
    return headers


def infrastructure_error(error_type: str, detail: str) -> ServiceError:
    """An error that is not the model's, by fal's name of it."""
    return ServiceError(STATUS_OF_TYPE[error_type], detail, error_type)


def model_error(status: int, kind: str, message: str) -> ServiceError:
    """An error of the model that no field is to blame for."""
    return ServiceError(status, [field_detail(None, message, kind)])


def field_error(
    field: str, message: str, kind: str, context: dict[str, Any] | None = None, value: Any = None
) -> ServiceError:
    """A 422 that names the field of the input."""
    return ServiceError(422, [field_detail(field, message, kind, context, value)])


def field_detail(
    field: str | None, message: str, kind: str, context: dict[str, Any] | None = None, value: Any = None
) -> dict[str, Any]:
    """One entry of fal's list of fields; long values are left out."""
    detail: dict[str, Any] = {
        "loc": ["body"] if field is None else ["body", field],
        "msg": message,
        "type": kind,
        "url": DOCS + kind,
    }
    if context:
        detail["ctx"] = context
    if value is not None and (not isinstance(value, str) or len(value) <= 200):
        detail["input"] = value
    return detail


def not_found() -> ServiceError:
    """What fal answers for a request that is unknown, expired or another key's."""
    return ServiceError(404, "not found", body={"status": "NOT_FOUND"})


def failed(error: ServiceError) -> Outcome:
    """How a request ends with an error; fal's clients see it in the state, and get its answer as the result."""
    detail = error.body.get("detail")
    kind = error.error_type or (str(detail[0]["type"]) if isinstance(detail, list) and detail else None)
    return Outcome(error.status, error.body, str(error), kind)
