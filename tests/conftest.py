"""Fixtures of several folders: tiny models, made once a test session, a judge's server, real data.

``tests.support`` is imported where a fixture is used: a file that needs no model is collected without PEFT and Lightning.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start as well

import pytest
import torch

if TYPE_CHECKING:
    from tests.support import Server

torch.set_num_threads(1)  # the models are too small to share out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long: the notebook, files with processes of their own, then every test marked slow.

    Two workers share the tests, and whichever is done takes from the other: a long test that comes last is waited for.
    """
    longest = ("notebooks/", "tests/ranks/", "tests/sandbox/", "tests/benchmarks/", "tests/memory/")

    def turn(item: pytest.Item) -> int:
        if not item.nodeid.startswith("notebooks/") and item.get_closest_marker("slow") is None:
            return len(longest) + 1
        return next((i for i, place in enumerate(longest) if item.nodeid.startswith(place)), len(longest))

    first: dict[tuple[str, str], int] = {}  # tests that look at one run: a worker that has not made it makes it again

    def place(number: int, item: pytest.Item) -> int:
        run_of = getattr(getattr(item, "module", None), "run_looked_at", None)
        given = getattr(item, "callspec", None)
        shared = run_of(item.originalname, given.params) if run_of and given else None  # type: ignore[attr-defined]
        return number if shared is None else first.setdefault((item.path.name, shared), number)

    places = {item: place(number, item) for number, item in enumerate(items)}
    items.sort(key=lambda item: (turn(item), places[item]))  # stable: the tests of a file stay together, and share


def pytest_collectstart() -> None:
    """Let the garbage collector rest while all is imported: a sixth of the time of that."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let it go to work, and never walk over what was imported: three quarters of a million objects."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """``seed_everything`` leaves its seed in the environment, and a run begins with it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import make_model

    return make_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import make_model

    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import make_model

    return make_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A judge's server, whose key is the one that a run would use."""
    from tests.support import KEY, Server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout, or a skip."""
    folder = Path(os.environ.get("MAESTRO_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found in {folder}; set MAESTRO_SHARED to a folder with data/")
    return folder
