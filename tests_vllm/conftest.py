"""The sandbox's policy, and vLLM servers as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# before vLLM is imported: its own process, no thread pinned (other tests have the cores), no report of use
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from maestro_pl.run.paths import sandbox_model

START_S = 1800.0  # a server took 71 s at best on two busy cores, and nine minutes where others had them


class Server:
    """``vllm serve`` with the sandbox's policy; :meth:`kill` and :meth:`start` it again at the same address."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(sandbox_model("policy")),
            "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16",
            "--max-loras", "1", "--logprobs-mode", "processed_logprobs", "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return
            time.sleep(0.5)
        pytest.fail(f"vllm serve did not answer within {START_S:g} s: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield made
    made.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    """The one server, started where it is not: a test may leave it dead, for starting takes a minute or more."""
    if not one_server.alive:
        one_server.start()
    one_server.wait()
    return one_server
