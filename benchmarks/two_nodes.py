"""Two nodes on one machine: two network namespaces, a wire between them, and a run of two ranks that have nothing else.

    python -m benchmarks.two_nodes [--launcher torchrun slurm] [--strategy auto fsdp] [--steps 3]

Needs Linux, root and ``ip`` (iproute2); says so in a sentence where it cannot run. ``slurm`` sets the variables that ``srun``
sets and starts the ranks itself: SLURM is not run. Prints whether both ranks came to their end, and in how many seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMES = ("maestro-node-0", "maestro-node-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRES = ("maestro0", "maestro1")
PORT = 29533
LIMIT_S = 600.0
ROOT = Path(__file__).parents[1]


def why_not() -> str:
    """Why two nodes cannot be made here; empty where they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "two nodes are two network namespaces of Linux, made by `ip` (iproute2), which is not here."
    if os.geteuid() != 0:
        return "network namespaces are made by root: run this as root, or in a container of your own."
    made = _ip("netns", "add", "maestro-try", check=False)
    _ip("netns", "delete", "maestro-try", check=False)
    return "" if made.returncode == 0 else f"the kernel makes no network namespace here ({made.stderr.strip()})."


@contextmanager
def two_nodes() -> Iterator[tuple[list[str], list[str]]]:
    """What to put in front of a command so that it runs on the first node, and on the second."""
    _remove()
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", WIRES[0], "netns", NAMES[0], "type", "veth", "peer", "name", WIRES[1], "netns", NAMES[1])
        for name, address, wire in zip(NAMES, ADDRESSES, WIRES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", wire)
            _ip("-n", name, "link", "set", wire, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", NAMES[0]], ["ip", "netns", "exec", NAMES[1]]
    finally:
        _remove()


def command(launcher: str, node: int, arguments: list[str]) -> list[str]:
    """The command of one node: a run of one rank on each of two nodes."""
    whole = ["fit", *arguments, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    if launcher == "slurm":
        return [sys.executable, "-m", "maestro_pl", *whole]
    place = ["--node-rank", str(node), "--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *place]
    return [sys.executable, *launch, "-m", "maestro_pl", *whole]


def environment(launcher: str, node: int) -> dict[str, str]:
    """The environment of one node; gloo and NCCL are told which wire to take, as on machines with several."""
    wire = {"GLOO_SOCKET_IFNAME": WIRES[node], "NCCL_SOCKET_IFNAME": WIRES[node]}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if launcher == "torchrun":
        return {**clean, **wire}
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "maestro", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "10.77.0.[1-2]", "SLURM_JOB_NODELIST": "10.77.0.[1-2]",
    }  # fmt: skip
    return {**clean, **wire, **slurm, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT)}


def run(launcher: str, arguments: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """Run on both nodes; the statuses, and what each said."""
    with two_nodes() as nodes:
        processes = []
        for node, inside in enumerate(nodes):
            output = (folder / f"node.{node}").open("wb")
            processes.append(
                subprocess.Popen(
                    [*inside, *command(launcher, node, arguments)],
                    stdout=output,
                    stderr=output,
                    env=environment(launcher, node),
                    cwd=folder,
                )
            )
        end = time.monotonic() + LIMIT_S
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        statuses = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    return statuses, [(folder / f"node.{node}").read_text(errors="replace") for node in range(2)]


def main() -> int:
    """Run what was asked for; 0 where every rank came to its end, or nothing can be run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", nargs="+", choices=("torchrun", "slurm"), default=["torchrun", "slurm"])
    parser.add_argument("--strategy", nargs="+", default=["auto"])
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    if reason := why_not():
        print(f"not run: {reason}")
        return 0
    failed = 0
    for launcher in given.launcher:
        for strategy in given.strategy:
            with tempfile.TemporaryDirectory() as name:
                folder, begin = Path(name), time.monotonic()
                arguments = _options(folder, strategy, given.steps)
                statuses, said = run(launcher, arguments, folder)
                saved = list(folder.rglob("last.ckpt"))
                well = statuses == [0, 0] and len(saved) == 1
                failed += not well
                seconds = time.monotonic() - begin
                outcome = "both ranks came to their end" if well else f"failed, statuses {statuses}"
                print(f"{launcher}, strategy {strategy}: {outcome} ({seconds:.0f} s)", flush=True)
                if not well:
                    print("\n".join(text[-3000:] for text in said))
    return int(failed > 0)


def _options(folder: Path, strategy: str, steps: int) -> list[str]:
    """Of a short run."""
    trainer = {
        "max_steps": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": "cpu", "strategy": strategy,
        "default_root_dir": folder,
    }  # fmt: skip
    options = ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.batch_size", "4"]
    options += ["--rollout.max_new_tokens", "16"]
    return options + [part for key, value in trainer.items() for part in (f"--trainer.{key}", str(value))]


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def _remove() -> None:
    for name in NAMES:
        _ip("netns", "delete", name, check=False)


if __name__ == "__main__":
    sys.exit(main())
