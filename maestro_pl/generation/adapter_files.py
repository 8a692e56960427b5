"""The policy's adapters as files, for engines that read them from a folder: a new name for every version."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.policy.loading import ADAPTER
from maestro_pl.policy.policy import LoRAPolicy

MEMORY = Path("/dev/shm")  # a folder that lies in memory
PREFIX = "maestro-adapters-"


@dataclass(frozen=True)
class Version:
    """One state of the adapters.

    Attributes:
        number: 1 for the first of a run.
        name: no other version, and no other run, has it: what an engine remembers of a name is never another's.
        folder: PEFT's files.
    """

    number: int
    name: str
    folder: Path


class AdapterFiles:
    """Writes the adapters where they have changed, into a folder of this process.

    Args:
        folder: where to; None: memory (/dev/shm) where there is room, else the system's temporary folder. What a process
            that is gone has left there is removed.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.asked = folder
        self.run = secrets.token_hex(4)
        self.version: Version | None = None
        self.former: Version | None = None
        self._digest = b""
        self._home: Path | None = None
        self._lock: FileLock | None = None

    def current(self, policy: LoRAPolicy) -> Version:
        """The version that the policy has now, written if it is new; the one before stays until the next.

        Raises:
            UserError: it cannot be written.
        """
        state = _adapters(policy)
        digest = _digest(state)
        if self.version is not None and digest == self._digest:
            return self.version
        number = 1 if self.version is None else self.version.number + 1
        name = f"maestro-{self.run}-{number}"
        try:
            version = Version(number, name, self._made_home(state) / name)
            _write(version.folder, policy, state)
        except OSError as error:
            raise UserError(
                f"The adapters cannot be written for the engine ({error}): give rollout.engine.init_args.folder one that has "
                "room, and that the engine can read."
            ) from error
        if self.former is not None:
            shutil.rmtree(self.former.folder, ignore_errors=True)
        self.former, self.version, self._digest = self.version, version, digest
        return version

    def close(self) -> None:
        """Remove all of it; numbers go on where they were."""
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()
        self._home, self._lock, self._digest, self.former = None, None, b"", None

    def _made_home(self, state: dict[str, Tensor]) -> Path:
        if self._home is None:
            need = 3 * sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            place = Path(self.asked) if self.asked is not None else _roomy(need)
            place.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(place)
            self._home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{self.run}-", dir=place))
            self._home.chmod(0o755)  # a server may be another user
            self._lock = FileLock(_lock_of(self._home))
            self._lock.acquire(timeout=0)
        return self._home

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process, half of it may be gone
            self.close()


def _adapters(policy: LoRAPolicy) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(policy.model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def _digest(state: dict[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.digest()


def _write(folder: Path, policy: LoRAPolicy, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config: Any = deepcopy(policy.model.peft_config[ADAPTER])
    config.base_model_name_or_path = policy.base_name
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _roomy(need: int) -> Path:
    with suppress(OSError):
        if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > need:
            return MEMORY
    return Path(tempfile.gettempdir())


def _lock_of(home: Path) -> Path:
    return home / "in_use"


def _remove_abandoned(place: Path) -> None:
    """Folders whose process was killed: nobody holds their lock."""
    for home in place.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            if _lock_of(home).exists():
                with FileLock(_lock_of(home)).acquire(timeout=0):
                    shutil.rmtree(home, ignore_errors=True)
