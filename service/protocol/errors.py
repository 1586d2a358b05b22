"""Errors of the service, in the two forms that fal's clients read: one line, or a list of fields."""

from typing import Any

from ..store import Outcome, QuotaExceeded

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


RETRY_AFTER_SECONDS = "5"


class ServiceError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        detail: one line, or fal's list of fields.
        error_type: fal's name of an infrastructure error, which is sent in body and header.
        headers: added to the response.
        body: sent instead of `detail`, for the few responses of fal that have another shape.
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
    """Returns the headers of a result. They are the same for a direct response and for a result fetched later.

    An error of the model has fal's list of fields. If its status is 500 or more, a retry may succeed.
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
    """Returns an error that the model did not cause, by fal's name of it."""
    return ServiceError(STATUS_OF_TYPE[error_type], detail, error_type)


def store_unavailable(store: str = "database") -> ServiceError:
    """Returns the error of a call that needs the database or the object store while it fails."""
    error = infrastructure_error("runner_scheduling_failure", f"The {store} does not answer; try again")
    error.headers["Retry-After"] = RETRY_AFTER_SECONDS
    return error


def model_error(status: int, kind: str, message: str) -> ServiceError:
    """Returns an error of the model that concerns no single field."""
    return ServiceError(status, [field_detail(None, message, kind)])


def field_error(
    field: str, message: str, kind: str, context: dict[str, Any] | None = None, value: Any = None
) -> ServiceError:
    """Returns a 422 that names a field of the input."""
    return ServiceError(422, [field_detail(field, message, kind, context, value)])


def field_detail(
    field: str | None, message: str, kind: str, context: dict[str, Any] | None = None, value: Any = None
) -> dict[str, Any]:
    """Returns one entry of fal's list of fields. Texts of more than 200 characters are left out.

    The name of a field in an object has a dot, such as `sparsectrl_lcm.conditioning_scale`.
    """
    detail: dict[str, Any] = {
        "loc": ["body", *(field.split(".") if field else ())],
        "msg": message,
        "type": kind,
        "url": DOCS + kind,
    }
    if context:
        detail["ctx"] = context
    if value is not None and (not isinstance(value, str) or len(value) <= 200):
        detail["input"] = value
    return detail


def quota_error(error: QuotaExceeded) -> ServiceError:
    """Returns the response to a request for which the key has no bytes left."""
    return ServiceError(507, str(error), "quota_exceeded")


def not_found() -> ServiceError:
    """Returns fal's response for a request that is unknown, expired or another key's."""
    return ServiceError(404, "not found", body={"status": "NOT_FOUND"})


def failed(error: ServiceError) -> Outcome:
    """Returns the outcome of a request that failed with this error."""
    detail = error.body.get("detail")
    kind = error.error_type or (str(detail[0]["type"]) if isinstance(detail, list) and detail else None)
    return Outcome(error.status, error.body, str(error), kind)
