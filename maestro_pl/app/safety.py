"""Who may ask the server, and what its pages may load."""

from __future__ import annotations

import ipaddress
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

READING = ("GET", "HEAD")
LOCAL_FRAMES = "'self' http://localhost:* http://127.0.0.1:*"  # a notebook on this machine shows a page as a frame


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that binds ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Safety:
    """Stands before an application.

    - Without a token only this machine is answered, under its local names (a page of another site that points its own
      name at 127.0.0.1 is refused), which holds through ``ssh -L`` too.
    - With a token every request needs it: once in the link, ``?token=...``, from then on in a cookie.
    - What changes something must come from a page of this server (Origin), whatever the token.
    - Every answer says that scripts, styles and images come from this server only, and nothing inline is run.

    Args:
        app: the ASGI application.
        token: None where only this machine can reach the server.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse in a sentence."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page has a web socket
            return
        answer = self._refusal(scope) or self._greeting(scope) or self.app

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._protect(MutableHeaders(scope=message))
            await send(message)

        await answer(scope, receive, safe)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return PlainTextResponse(f"This server answers on this machine only, and not as {host!r}.", 403)
        foreign = origin is not None and urlsplit(origin).netloc != host
        across = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        if scope["method"] not in READING and (foreign or across):
            return PlainTextResponse("Refused: the request comes from a page of another site.", 403)
        if self.token is not None and not self._knows_token(scope, headers):
            return PlainTextResponse(
                "Open the whole link that the command printed: its token is missing or wrong.", 403
            )
        return None

    def _greeting(self, scope: Scope) -> Response | None:
        """Take the token out of the address into a cookie, so that no bookmark, history or screenshot holds it."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if self.token is None or scope["method"] != "GET" or "token" not in dict(query):
            return None
        rest = urlencode([(key, value) for key, value in query if key != "token"])
        path = "/" + scope["path"].lstrip("/\\")  # `//name/` would be another server
        answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
        # lax: with `strict` a link in a mail would be refused; what changes something is refused by its Origin
        answer.set_cookie(_cookie_of(scope), self.token, httponly=True, samesite="lax")
        return answer

    def _knows_token(self, scope: Scope, headers: Headers) -> bool:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        try:
            kept = SimpleCookie(headers.get("cookie", "")).get(_cookie_of(scope))
        except CookieError:
            kept = None
        given = [query.get("token", ""), kept.value if kept is not None else ""]
        return any(secrets.compare_digest(text.encode(), str(self.token).encode()) for text in given)

    def _protect(self, headers: MutableHeaders) -> None:
        frames = LOCAL_FRAMES if self.token is None else "'self'"
        headers["content-security-policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            f"form-action 'self'; base-uri 'none'; frame-ancestors {frames}"
        )
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "same-origin"  # without one, a form of our own comes with the Origin `null`
        headers["cross-origin-resource-policy"] = "same-origin"
        headers.setdefault("cache-control", "no-store")


def _cookie_of(scope: Scope) -> str:
    """Cookies ignore the port, so that two servers of one machine would share one of the same name."""
    port = (scope.get("server") or ("", 0))[1]
    return f"maestro_pl_{port}"
