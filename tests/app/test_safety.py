"""Who is answered, what an answer allows, and what a server prints."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from maestro_pl.app.safety import is_loopback
from maestro_pl.app.serving import bound, link, running, token_for
from maestro_pl.app.web import Page, web_app
from maestro_pl.errors import UserError


def app_of(token: str | None = None) -> Any:
    app = web_app(Page(), token)

    @app.get("/hello")
    def hello() -> str:
        return "hello"

    @app.post("/change")
    def change() -> str:
        return "changed"

    @app.get("/bad")
    def bad() -> str:
        raise UserError("the value <b>7</b> is wrong")

    return app


@pytest.fixture(scope="module")
def local() -> Iterator[str]:
    with running(app_of()) as address:
        yield address


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with running(app_of("s3cret")) as address:
        yield address


def ask(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def test_this_machine_is_answered_under_its_own_names(local: str) -> None:
    port = urlsplit(local).port
    assert ask(local, "/hello")[:2] == (200, '"hello"')
    for host in ("localhost:9999", f"127.0.0.1:{port}", "[::1]:1"):  # ssh -L changes the port
        assert ask(local, "/hello", Host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):  # DNS rebinding
        assert ask(local, "/hello", Host=host)[0] == 403


def test_what_changes_something_comes_from_our_pages_only(local: str) -> None:
    own = urlsplit(local).netloc
    assert ask(local, "/change", "POST", Origin=f"http://{own}")[0] == 200
    assert ask(local, "/change", "POST")[0] == 200  # no browser
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert ask(local, "/change", "POST", Origin=origin)[0] == 403
    assert ask(local, "/change", "POST", Sec_Fetch_Site="cross-site")[0] == 403


def test_every_answer_forbids_foreign_and_inline_scripts(local: str) -> None:
    for path in ("/hello", "/static/app.js", "/bad", "/nowhere"):
        headers = ask(local, path)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_another_host_needs_the_token_of_the_link(guarded: str) -> None:
    for path in ("/hello", "/hello?token=wrong", "/static/app.js"):
        status, text, _ = ask(guarded, path)
        assert (status, "token" in text) == (403, True)
    status, _, headers = ask(guarded, "/hello?token=s3cret&x=1", Host="elsewhere:1")
    assert (status, headers["location"]) == (303, "/hello?x=1")  # the address bar forgets it
    cookie = headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite=lax" in cookie.lower()
    assert ask(guarded, "/hello", Cookie=cookie.split(";")[0])[0] == 200
    foreign = {"Cookie": cookie.split(";")[0], "Origin": "http://evil.example"}
    assert ask(guarded, "/change", "POST", **foreign)[0] == 403
    assert ask(guarded, "//evil.example/?token=s3cret")[2]["location"] == "/evil.example/"


def test_errors_are_sentences_and_files_stay_below_the_folder(local: str) -> None:
    status, text, _ = ask(local, "/bad")
    assert status == 400
    assert "the value &lt;b&gt;7&lt;/b&gt; is wrong" in text
    for path in ("/nowhere", "/static/../web.py", "/static/%2e%2e/web.py", "/docs", "/openapi.json"):
        assert ask(local, path)[0] == 404


def test_hosts_tokens_and_ports() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "", "10.0.0.1", "localhost.evil.example")] == [False] * 4
    assert token_for("127.0.0.1") is None
    assert len(token_for("0.0.0.0") or "") >= 32
    assert token_for("0.0.0.0") != token_for("0.0.0.0")
    assert link("127.0.0.1", 80, "t", "/a?b=1") == "http://127.0.0.1:80/a?b=1&token=t"
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="choose another"):
            bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--port 70000"):
        bound("127.0.0.1", 70000)
