"""The path of fal's server-side proxy, for calls without an allowed target. Others go to the route of their target."""

from fastapi import APIRouter
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..protocol.urls import PROXY_PATH


class _Refused:
    """Refuses a call of any method."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise scope["proxy_error"]


router = APIRouter(routes=[Route(PROXY_PATH, _Refused())])
