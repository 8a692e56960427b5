"""A chat completions server on this machine whose answers a test or a fault campaign writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-key-0123456789"


class Server:
    """A chat completions server whose answers the test writes: ``answer(body, number)`` gives a text, a status, or acts."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Any] = lambda body, number: "Verdict: correct"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.message = ""  # added to the text of an error
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.times.append(time.monotonic())
                    server.paths.append(self.path)
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    server.respond(self, server.answer(body, number))
                finally:
                    with server.lock:
                        server.now -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def hang(self) -> None:
        """Give no answer as long as the test runs: what waits for one waits longer than any machine is slow."""
        self.closed.wait(600)

    def close(self) -> None:
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    def respond(self, handler: Any, answer: Any) -> None:
        """A text is a completion, bytes a raw body, a number a status, a pair a status with headers, None hangs up."""
        if answer is None:
            handler.close_connection = True
            handler.connection.close()
            return
        status, headers, data = 200, {}, b""
        if isinstance(answer, str):
            data = json.dumps(completion(answer)).encode()
        elif isinstance(answer, bytes):
            data = answer
        else:
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            data = json.dumps({"error": {"message": f"status {status}, your key was {KEY} {self.message}"}}).encode()
        with suppress(OSError):  # the client has given up
            handler.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)


def completion(text: Any) -> dict[str, Any]:
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip
