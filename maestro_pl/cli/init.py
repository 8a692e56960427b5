"""``maestro-pl init``: look at a data set and write a first config for it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maestro_pl.cli.parser import ToolParser
from maestro_pl.errors import UserError, printable

PER_TOKEN = 3.5  # characters, where the tokenizer is not there


def init(arguments: list[str]) -> None:
    """Write a commented config for a data set, and say what to run next.

    Args:
        arguments: those after ``maestro-pl init``.

    Raises:
        UserError: data or an option that cannot be used, or a file that is there already.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {options.out!r}: expected a name that ends in .yaml.")
    if out.exists():
        raise UserError(f"{out} exists already, and nothing is overwritten: name another with --out, or remove it.")
    if not out.parent.is_dir():
        raise UserError(f"--out {options.out!r}: there is no folder {str(out.parent)!r}.")

    # heavy imports only once the arguments are known to be good
    from maestro_pl.cli.first_config import describe, next_commands, plan_for, system_prompt_for, text_of
    from maestro_pl.data.survey import lengths_of, survey

    found = survey(options.data, options.prompt, options.reference)
    system_prompt = system_prompt_for(found)
    count, reading = _read_model(options.model, system_prompt)
    rows = [row for piece in found.pieces for row in piece.all_rows]
    lengths = lengths_of(rows, count)
    plan = plan_for(found, lengths, reading, system_prompt)
    command = shlex.join(["maestro-pl", "init", *arguments])
    text = text_of(found, lengths, reading, plan, options.model, str(out), command)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    for piece in found.pieces:
        print(printable(describe(piece)))
    if not reading.exact:
        print(
            f"Lengths are estimated: the tokenizer of {options.model} cannot be loaded ({printable(reading.reason)})."
        )
    if not found.counts["validation"]:
        print("There are no validation prompts: nothing is evaluated before and after.")
    for sentence in plan.missing:
        print(f"{sentence[0].upper()}{sentence[1:]}.")
    weighed = ", ".join(entry.kind for entry in plan.rewards)
    by = "a Conductor, from the anchors" if plan.anchors else "equal weights: nothing says which to trust"
    print(f"Rewards: {weighed}. Weighed by {by}.")
    print(f"Wrote {out}. Look it through, then:")
    print("\n".join(f"  {line}" for line in next_commands(str(out))))


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="maestro-pl init",
        description="Look at a data set and write a commented config for it that works: columns, system prompt, rewards, "
        "weigher, limits, and an evaluation before and after.",
    )
    parser.add_argument(
        "data", help="a .jsonl, .json, .csv, .tsv or .parquet file (.gz too), a folder or pattern, a hub id"
    )
    parser.add_argument(
        "--model", required=True, help="folder or hub id of a causal LM; sandbox is the embedded tiny one"
    )
    parser.add_argument(
        "--out", default="mine.yaml", help="the config to write, which must not be there yet (%(default)s)"
    )
    parser.add_argument("--prompt", help="the column of the prompt, where its name does not say so; a.b goes inside")
    parser.add_argument("--reference", help="the column of the reference, likewise")
    return parser


def _read_model(model: str, system_prompt: str) -> tuple[Callable[[str], int], Any]:
    """A counter of tokens, and what is known of the model; estimated where its tokenizer cannot be loaded."""
    from maestro_pl.cli.first_config import Reading
    from maestro_pl.data.rendering import PromptRenderer
    from maestro_pl.policy.loading import resolve_model
    from maestro_pl.run.pretrained import NotLoaded, pretrained_tokenizer

    place = resolve_model(model)
    try:
        tokenizer = pretrained_tokenizer(place)
    except NotLoaded as error:
        if Path(model).expanduser().exists():  # a folder that is there must be a model: `fit` would end the same way
            raise UserError(f"--model {model!r}: the tokenizer cannot be loaded: {error}.") from error
        # Qwen3's template is known by name; one that knows no such argument does not mind it
        guessed = Reading(reason=str(error), thinks="qwen3" in model.lower())
        return lambda text: int(len(text) / PER_TOKEN) + 1, guessed
    reading = Reading(exact=True, positions=_positions(place))
    reading.thinks = "enable_thinking" in str(getattr(tokenizer, "chat_template", None) or "")
    more: dict[str, Any] = {"enable_thinking": False} if reading.thinks else {}
    renderer = PromptRenderer(tokenizer, system_prompt, more)
    try:
        text = renderer.text("Hi")
    except ValueError:
        renderer.system_role = "user"
        reading.refuses_system = True
        text = renderer.text("Hi")
    reading.opens_think = text.rstrip().endswith("<think>")
    reading.overhead = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 8
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), reading


def _positions(place: str) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError):  # adapters alone, or an architecture that transformers does not know
        return None
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
