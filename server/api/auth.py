"""API keys: every path needs one, except those that say how the server is."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer.server.api.errors import HTTPError

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})


class RequireKey:
    """Refuses requests without a known key. Reads the path that the router reads, and nothing built from `Host`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self.digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_path(scope) not in self.open_paths and not self._known(scope):
            raise HTTPError(
                401,
                "Send a valid API key in the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Every key is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(matches)


def route_path(scope: Scope) -> str:
    """The path below `root_path`, by the rule the router itself uses."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path
