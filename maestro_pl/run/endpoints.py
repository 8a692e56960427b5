"""What everything that asks OpenAI-compatible servers shares: the client, addresses, keys, and what went wrong."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from maestro_pl.errors import UserError


@dataclass(frozen=True)
class Trouble:
    """A request that gave nothing.

    Attributes:
        kind: ``timeout``, ``connection`` (refused, dropped, no such host), ``rate_limit`` (429), ``server`` (5xx) or
            ``refused`` (any other 4xx: the next try fails as well).
        detail: the last thing seen.
        status: of the answer; 0 where there was none.
        wait: seconds that the server asks to wait.
        quota: the account's credit is used up.
    """

    kind: str
    detail: str
    status: int = 0
    wait: float | None = None
    quota: bool = False


def import_openai(who: str) -> Any:
    """The package with the client.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise UserError(f"{who} needs the package openai: pip install -e '.[judge]'.") from error


def request_errors(openai: Any) -> tuple[type[BaseException], ...]:
    """What a request of the client may raise, to be read by :func:`trouble_of`."""
    return (openai.OpenAIError, asyncio.TimeoutError, TimeoutError, OSError, ValueError)


def trouble_of(openai: Any, error: BaseException, timeout_s: float) -> Trouble:
    """What an error of a request means.

    Args:
        openai: the package.
        error: one of :func:`request_errors`.
        timeout_s: how long the request was waited for.
    """
    if isinstance(error, (openai.APITimeoutError, asyncio.TimeoutError, TimeoutError)):
        return Trouble("timeout", f"no answer within {timeout_s:g} s")
    if isinstance(error, openai.APIStatusError):
        status, quota = error.status_code, error.code == "insufficient_quota"
        detail = f"HTTP {status}: {error.message}"
        return Trouble(_kind_of(status, quota), detail, status, retry_after(error.response.headers), quota)
    if isinstance(error, openai.APIConnectionError):
        return Trouble("connection", str(error.__cause__ or error) or type(error).__name__)
    return Trouble("connection", f"{type(error).__name__}: {error}")


def _kind_of(status: int, quota: bool) -> str:
    if status == 429 and not quota:
        return "rate_limit"
    return "server" if status >= 500 or status in (408, 409) else "refused"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that ``Retry-After`` (seconds or a date) asks to wait, or None."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def split_url(url: str, what: str) -> SplitResult:
    """The parts of a server's address; ``what`` it is, for the sentence.

    Raises:
        UserError: it is no address, or holds a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{what} {url!r} is no address ({error}).") from error
    if parts.username or parts.password:
        raise UserError(
            f"{what} holds a user name or password: take it out and name the environment variable with the key as "
            "api_key_env."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{what} is {url!r}, expected an address such as http://localhost:8000/v1.")
    return parts


def read_key(name: str) -> str:
    """The key in an environment variable; empty where it is not set.

    Raises:
        UserError: it cannot be sent.
    """
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"The API key in ${name} holds signs that no HTTP header can carry: set it anew.")
    return key


def without_key(text: str, key: str) -> str:
    """A server's words on one short line, without the key."""
    text = text.replace(key, "***") if key else text
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"{flat[:197]}..."
