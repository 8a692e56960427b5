"""vLLM's two faces with a tiny model behind them: a module ``vllm`` in process, and an HTTP server.

Both read the adapters' files with PEFT, as vLLM reads them itself, so what the engines write is tried out too.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_loading = (
    threading.Lock()
)  # transformers replaces a method of its models while it loads one: two at once leave it replaced


class FakeModel:
    """A base and the adapters that were loaded, by name.

    Attributes:
        shift: added to every log-probability that is told.
        stale: new adapters are said to be loaded, and the first ones go on answering.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.models: dict[str, Any] = {}
        self.shift = 0.0
        self.stale = False
        self.lock = threading.Lock()

    def load(self, name: str, folder: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with self.lock:
            if self.stale and self.models:
                self.models[name] = next(iter(self.models.values()))
                return
            with _loading:
                base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            self.models[name] = PeftModel.from_pretrained(base, folder).eval()

    def logits(self, name: str, rows: list[list[int]]) -> Tensor:
        with torch.no_grad(), self.lock:
            logits: Tensor = self.models[name](input_ids=torch.tensor(rows)).logits.float()
            return logits

    def known(self, name: str, ids: list[int]) -> list[float]:
        logps = self.logits(name, [ids])[0, :-1].log_softmax(-1)
        return [float(logps[i, token]) + self.shift for i, token in enumerate(ids[1:])]

    def sample(self, name: str, ids: list[int], n: int, params: dict[str, Any]) -> list[dict[str, Any]]:
        temperature, stops = params["temperature"], set(params["stop_token_ids"])
        draws = torch.Generator().manual_seed(int(params.get("seed") or 0))
        rows: list[list[int]] = [[] for _ in range(n)]
        logps: list[list[float]] = [[] for _ in range(n)]
        open_rows = list(range(n))
        for _ in range(params["max_tokens"]):
            last = self.logits(name, [ids + rows[i] for i in open_rows])[:, -1] / (temperature or 1.0)
            distribution = last.log_softmax(-1)
            picked = last.argmax(-1) if temperature == 0 else _draw(distribution, draws)
            for row, token, values in zip(open_rows, picked.tolist(), distribution, strict=True):
                rows[row].append(token)
                logps[row].append(float(values[token]) + self.shift)
            open_rows = [i for i in open_rows if rows[i][-1] not in stops]
            if not open_rows:
                break
        return [
            {
                "index": i,
                "token_ids": rows[i],
                "logps": logps[i],
                "finish_reason": "length" if i in open_rows else "stop",
            }
            for i in range(n)
        ]


def _draw(distribution: Tensor, draws: torch.Generator) -> Tensor:
    return torch.multinomial(distribution.exp(), 1, generator=draws).squeeze(1)


# -- the module ---------------------------------------------------------------------------------------------------------


@dataclass
class _Logprob:
    logprob: float


@dataclass
class _LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class _Params(types.SimpleNamespace):
    pass


@dataclass
class FakeVLLM:
    """What a test sees of the module.

    Attributes:
        made: keyword arguments of every ``LLM``.
        llms: every one.
        slow: called before every step of an engine.
        sleeps: the device has a sleep mode.
    """

    made: list[dict[str, Any]] = field(default_factory=list)
    llms: list[Any] = field(default_factory=list)
    slow: Callable[[], None] = lambda: None
    sleeps: bool = False
    shift: float = 0.0
    stale: bool = False


def install(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    """Put a module ``vllm`` in the place of the real one."""
    told = FakeVLLM()

    class Engine:
        def __init__(self, llm: LLM) -> None:
            self.llm, self.waiting = llm, []
            self.model_config = types.SimpleNamespace(max_model_len=llm.given.get("max_model_len", 256))
            self.engine_core = types.SimpleNamespace(shutdown=lambda: llm.calls.append("shutdown"))

        def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> str:
            if lora_request.lora_name not in self.llm.model.models:
                self.llm.model.load(lora_request.lora_name, lora_request.lora_path)
            self.waiting.append((name, prompt["prompt_token_ids"], params, lora_request))
            return name

        def has_unfinished_requests(self) -> bool:
            return bool(self.waiting)

        def abort_request(self, names: list[str]) -> None:
            self.waiting = [each for each in self.waiting if each[0] not in names]

        def step(self) -> list[Any]:
            told.slow()
            if "sleep" in self.llm.calls and self.llm.calls[-1] == "sleep":
                raise RuntimeError("it sleeps")
            name, ids, params, lora = self.waiting.pop()  # the last first: order is the engine's to keep
            model = self.llm.model
            known = None
            if getattr(params, "prompt_logprobs", None) is not None:
                scores = model.known(lora.lora_name, ids)
                known = [None, *({token: _Logprob(value)} for token, value in zip(ids[1:], scores, strict=True))]
                samples = []
            else:
                samples = [
                    types.SimpleNamespace(
                        index=each["index"],
                        token_ids=each["token_ids"],
                        finish_reason=each["finish_reason"],
                        logprobs=[
                            {token: _Logprob(value), -1: _Logprob(9.0)}
                            for token, value in zip(each["token_ids"], each["logps"], strict=True)
                        ],
                    )
                    for each in model.sample(lora.lora_name, ids, params.n, vars(params))
                ]
            return [
                types.SimpleNamespace(
                    request_id=name, finished=True, outputs=samples[::-1], prompt_logprobs=known, lora_request=lora
                )
            ]

    class LLM:
        def __init__(self, model: str, **given: Any) -> None:
            torch.manual_seed(1234)  # as vLLM does to its own process
            told.made.append({"model": model, **given})
            told.llms.append(self)
            self.given, self.calls = given, []
            self.model = FakeModel(model)
            self.model.shift, self.model.stale = told.shift, told.stale
            self.llm_engine = Engine(self)

        def sleep(self, level: int) -> None:
            assert level == 1
            self.calls.append("sleep")

        def wake_up(self) -> None:
            self.calls.append("wake")

    def module(name: str, **content: Any) -> None:
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)  # others ask whether it is installed
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    kinds = types.SimpleNamespace(FINAL_ONLY="final")
    platform = types.SimpleNamespace(is_sleep_mode_available=lambda: told.sleeps)
    module("vllm", LLM=LLM, SamplingParams=_Params)
    module("vllm.sampling_params", RequestOutputKind=kinds)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=_LoRARequest)
    module("vllm.platforms", current_platform=platform)
    return told


# -- the server ---------------------------------------------------------------------------------------------------------


class FakeVLLMServer:
    """Speaks ``/v1/models``, ``/v1/completions``, ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``.

    Attributes:
        hook: ``hook(path, body)`` is called before a request is answered: a number is a status in place of the answer,
            "drop" hangs up, a dict changes fields of the answer, None leaves it.
        asked: every request, (path, body).
    """

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.folder = folder
        self.model = FakeModel(folder)
        self.hook: Callable[[str, dict[str, Any]], Any] = lambda path, body: None
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.raw = False  # log-probabilities at temperature 1 whatever is asked
        self.max_model_len = 256
        self.closed = threading.Event()
        self._open: list[Any] = []
        self.start(port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, port: int = 0) -> None:
        """Listen; after :meth:`kill` at the same address, without adapters."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.respond(self, {})

            def do_POST(self) -> None:
                server.respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.model.models.clear()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """Stop listening and hang up on whoever waits."""
        self.http.shutdown()
        self.http.server_close()
        for handler in list(self._open):
            with suppress(OSError):
                handler.connection.shutdown(2)

    def close(self) -> None:
        self.closed.set()
        with suppress(OSError):
            self.kill()

    def count(self, path: str) -> int:
        return sum(asked == f"/v1/{path}" for asked, _ in self.asked)

    def respond(self, handler: Any, body: dict[str, Any]) -> None:
        self.asked.append((handler.path, body))
        self._open.append(handler)
        found = self.hook(handler.path, body)
        if found == "drop":
            handler.close_connection = True
            with suppress(OSError):
                handler.connection.shutdown(2)
            return
        status, answer = (found, {"error": {"message": f"status {found}"}}) if isinstance(found, int) else (200, None)
        if answer is None:
            status, answer = self.answer(handler.path, body)
        if isinstance(found, dict) and isinstance(answer, dict):
            answer |= found
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        with suppress(OSError):
            handler.send_response(status)
            handler.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        models = self.model.models
        if path == "/v1/models":
            base = {"id": "base", "max_model_len": self.max_model_len, "parent": None}
            return 200, {"object": "list", "data": [base, *({"id": name, "parent": "base"} for name in models)]}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in models:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            if not (Path(body["lora_path"]) / "adapter_config.json").exists():
                return 404, {"error": {"message": f"No adapter found for '{body['lora_path']}'"}}
            self.model.load(body["lora_name"], body["lora_path"])
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            found = models.pop(body["lora_name"], None)
            return (404, {"error": {"message": "not found"}}) if found is None else (200, "Success")
        if body["model"] not in models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return 200, {"object": "text_completion", "model": body["model"], "choices": self.choices(body)}

    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        name, ids, n = body["model"], body["prompt"], body.get("n", 1)
        if "prompt_logprobs" in body:
            scored = self.model.known(name, ids)
            known = [None, *({str(t): {"logprob": v}} for t, v in zip(ids[1:], scored, strict=True))]
            return [{"index": 0, "finish_reason": "length", "prompt_logprobs": known}]
        if body.get("logprobs"):
            scale = 1.0 if self.raw else body["temperature"]
            best = (self.model.logits(name, [ids])[0, -1] / scale).log_softmax(-1).topk(body["logprobs"])
            top = {str(token): value for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
            return [{"index": 0, "finish_reason": "length", "logprobs": {"top_logprobs": [top]}}]
        return [
            {
                "index": each["index"],
                "finish_reason": each["finish_reason"],
                "token_ids": each["token_ids"],
                "logprobs": {"token_logprobs": each["logps"]},
            }
            for each in self.model.sample(name, ids, n, body)[::-1]
        ]
