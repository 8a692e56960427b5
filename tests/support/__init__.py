"""What several test files use: tiny models, rollouts, trainers, data and a server. No test file imports another one."""

from benchmarks.chat_server import KEY, Server
from tests.support.data import EA, EU, INSTRUCTION, PUBLISHED, THOUGHT, TOM, write_nover, write_rows
from tests.support.fuzzing import fuzz
from tests.support.models import make_model, make_policy, make_tokenizer, spread, store_in_four_bits
from tests.support.rollouts import given, listed, make_rollout, reward_module, run
from tests.support.trainers import (
    Watch,
    constant,
    data_of,
    elevens,
    module_of,
    quiet_trainer,
    rewards,
    sevens,
    trainer_of,
    watched_fit,
)

__all__ = [
    "EA",
    "EU",
    "INSTRUCTION",
    "KEY",
    "PUBLISHED",
    "THOUGHT",
    "TOM",
    "Server",
    "Watch",
    "constant",
    "data_of",
    "elevens",
    "fuzz",
    "given",
    "listed",
    "make_model",
    "make_policy",
    "make_rollout",
    "make_tokenizer",
    "module_of",
    "quiet_trainer",
    "reward_module",
    "rewards",
    "run",
    "sevens",
    "spread",
    "store_in_four_bits",
    "trainer_of",
    "watched_fit",
    "write_nover",
    "write_rows",
]
