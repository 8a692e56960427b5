"""``maestro-pl estimate``: the memory of a run before it starts, from its config."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import replace
from typing import Any

import rich
from rich.table import Table

from maestro_pl.cli.arguments import take
from maestro_pl.errors import UserError
from maestro_pl.run.loading import without_collector
from maestro_pl.run.yaml_files import parse_yaml

HELP = """usage: maestro-pl estimate --config FILE [--card GIB] [--reserve GIB] [--devices N] [--strategy fsdp] [--json]
                           [--key value ...]

The memory of `maestro-pl fit` with this config, by part, from the model's config alone: no weights are read, no GPU is needed.
Any key of the config can be given as for `fit` (--rollout.group_size 4).

options:
  --config FILE   as for `fit`
  --card GIB      the memory of the card (8, 12, 16, 24, 48, 80 or another); says what to change where the run does not fit
  --reserve GIB   what other programs hold of it, such as a display (often 0.3 to 1); default 0
  --devices N     as --trainer.devices N; the table is of one of them
  --strategy fsdp as --trainer.strategy fsdp: parameters, gradients and optimizer states are cut over the devices
  --json          one JSON object instead of the tables
"""


DISPLAY_GIB = 0.7  # what a desktop and a browser hold of a card


def estimate_command(arguments: list[str]) -> None:
    """Print the estimate of a config, and what to change for a card.

    Args:
        arguments: those after ``maestro-pl estimate``.

    Raises:
        UserError: a config or an option that cannot be used.
    """
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return
    cards, others = take(arguments, ("--card",))
    reserves, others = take(others, ("--reserve",))
    for option in ("--devices", "--strategy"):
        given, others = take(others, (option,))
        others += [f"--trainer.{option.removeprefix('--')}", given[-1]] if given else []
    as_json = "--json" in others
    config = parsed_config([word for word in others if word != "--json"])
    _check_devices(config["trainer"].get("devices"), config["trainer"].get("strategy"))
    card = _gib("--card", cards[-1]) if cards else None
    reserve = _gib("--reserve", reserves[-1]) if reserves else 0.0
    if card is not None and reserve >= card:
        raise UserError(f"--reserve {reserve:g} leaves nothing of a card of {card:g} GiB.")

    # heavy imports only once the arguments are known to be good
    from maestro_pl.memory.advice import CARDS, to_fit
    from maestro_pl.memory.estimate import GIB, estimate, vllm_needs
    from maestro_pl.memory.workload import DEFAULT_PROMPT, workload_of

    workload = workload_of(config)
    needed = estimate(workload)
    found = needed
    if card is not None and workload.vllm_share:
        workload = replace(workload, card_bytes=int(card * GIB))
        found = estimate(workload)
    room = None if card is None else card - reserve
    advised = to_fit(workload, room) if room is not None and not found.fits(room) else None
    notes = []
    if config["data"].get("max_prompt_tokens") is None:
        notes.append(f"data.max_prompt_tokens is not set: prompts of {DEFAULT_PROMPT} tokens are assumed.")
    if workload.uncounted:
        notes.append(f"Not counted: models that rewards load of their own ({', '.join(workload.uncounted)}).")
    if workload.vllm_share:
        notes.append(_vllm_note(workload.vllm_share, vllm_needs(needed) / GIB, card))
    if workload.elsewhere:
        notes.append("Not counted: what the vLLM servers hold on their own cards.")
    if as_json:
        print(json.dumps(_plain(found, card, reserve, advised, notes)))
        return
    rich.print(_table(workload, found))
    for note in notes:
        rich.print(note)
    need = found.card_bytes / GIB
    fitting = [size for size in CARDS if found.fits(size - reserve)]
    rich.print(
        f"Needs a card of {need:.1f} GiB (5 % for fragmentation and 0.6 GiB for CUDA itself are added): "
        + (f"fits {', '.join(map(str, fitting))} GB." if fitting else "fits none of 8 to 80 GB.")
    )
    if card is None or room is None:
        return
    if advised is None:
        rich.print(f"It fits a card of {card:g} GB." + _margin(found, room, reserve))
        return
    chosen, after = advised
    fits = after.fits(room)
    rich.print(f"It does not fit a card of {card:g} GB. " + ("Change:" if fits else "Even all of this is not enough:"))
    for change in chosen:
        rich.print(f"  {change}")
    rich.print(
        f"which needs {after.card_bytes / GIB:.1f} GiB."
        + (_margin(after, room, reserve) if fits else " Take a smaller model, or a larger card.")
    )


def parsed_config(arguments: list[str]) -> dict[str, Any]:
    """The whole config that ``fit`` with these arguments would run with, as plain values; nothing is built.

    Raises:
        UserError: as for ``fit``.
    """
    with without_collector():
        from maestro_pl.cli.run import MaestroCLI, make_cli

    class ParsedCLI(MaestroCLI):
        """Parses and stops."""

        def instantiate_classes(self) -> None:
            """Nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing."""

    cli = make_cli(["fit", *arguments], ParsedCLI)
    parser = cli._parser("fit")
    dumped = parser.dump(cli.config["fit"], skip_validation=True)
    config: dict[str, Any] = parse_yaml(dumped)
    return config


def _margin(found: Any, room: float, reserve: float) -> str:
    """What to know where little is left of the card."""
    from maestro_pl.memory.estimate import GIB

    left = room - found.card_bytes / GIB
    if reserve or left >= DISPLAY_GIB:
        return ""
    return f" {left:.1f} GiB are left: where the card drives a display too, give --reserve {DISPLAY_GIB:g}."


def _vllm_note(share: float, need: float, card: float | None) -> str:
    """What ``memory_share`` must be."""
    if card is None:
        return f"VLLMEngine needs {need:.1f} GiB while it samples: give a memory_share that is as much of the card (--card)."
    if share * card >= need:
        return (
            f"VLLMEngine takes memory_share={share:g} of the card, {share * card:.1f} GiB, and needs {need:.1f} of it."
        )
    return (
        f"VLLMEngine needs {need:.1f} GiB while it samples, and memory_share={share:g} of {card:g} GB is {share * card:.1f}: "
        f"give rollout.engine.init_args.memory_share at least {math.ceil(100 * need / card) / 100:g}."
    )


def _gib(option: str, given: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", given.strip(), re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise UserError(f"{option} {given!r}: expected memory in GiB, such as 12.")
    return float(match.group(1))


def _check_devices(devices: Any, strategy: Any) -> None:
    """Raise where ``fit`` would refuse the devices or the name of a strategy."""
    shown = ",".join(map(str, devices)) + "," if isinstance(devices, list) else str(devices).replace(" ", "")
    if not re.fullmatch(r"auto|-1|[1-9]\d*|(\d+,)+\d*", shown):
        raise UserError(
            f"--devices {devices}: expected how many devices, a whole number from 1 on, or the numbers of some, such as [0,1]."
        )
    from lightning.pytorch.strategies import StrategyRegistry

    names = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in names:
        close = difflib.get_close_matches(strategy, names, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"--strategy {strategy!r}{meant}: expected auto, ddp or fsdp, or another name that Lightning knows."
        )


def _table(workload: Any, found: Any) -> Table:
    from maestro_pl.memory.estimate import GIB

    table = Table("part", "GiB", "when")
    for name, size in found.lasting.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}", "always")
    for phase, parts in found.phases.items():
        for name, size in parts.items():
            table.add_row(name, f"{size / GIB:.2f}", phase + (" (the peak)" if phase == found.phase else ""))
    for name, size in found.host.items():
        table.add_row(name, f"{size / GIB:.2f}", "in host memory")
    table.add_section()
    table.add_row("allocated at the peak", f"{found.peak / GIB:.2f}", found.phase)
    table.title = (
        f"{workload.max_prompt_tokens} + {workload.max_new_tokens} tokens, largest pass of the update: {found.passes}"
    )
    return table


def _plain(found: Any, card: float | None, reserve: float, advised: Any, notes: list[str]) -> dict[str, Any]:
    plain = {
        "lasting": found.lasting,
        "phases": found.phases,
        "host": found.host,
        "peak_phase": found.phase,
        "peak_bytes": found.peak,
        "card_bytes": found.card_bytes,
        "notes": notes,
    }
    if card is not None:
        chosen, after = advised or ([], found)
        plain |= {
            "card_gib": card,
            "reserve_gib": reserve,
            "fits": advised is None,
            "changes": [{"key": c.key, "value": c.value, "cost": c.cost} for c in chosen],
            "card_bytes_after": after.card_bytes,
            "fits_after": after.fits(card - reserve),
        }
    return plain
