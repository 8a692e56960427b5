"""Pretrained models and tokenizers of transformers: every weight comes from the files, or a sentence says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from maestro_pl.errors import OutOfMemory, UserError

Made = TypeVar("Made")
SHOWN = 5  # names of tensors in a sentence

#: What the packages are called that these attentions need.
ATTENTION_PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}


class NotLoaded(UserError):
    """A model or tokenizer could not be made of what is stored; the message is the reason, without a full stop.

    Attributes:
        missing: names of tensors that the model has and its files lack.
    """

    def __init__(self, reason: str, missing: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.missing = list(missing)


def pretrained_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        NotLoaded: saying why.
    """
    from transformers import AutoTokenizer

    return _made(lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code), {})


def pretrained_model(auto: Any, name: str, *, unread: tuple[str, ...] = (), **options: Any) -> Any:
    """A model of a folder or hub id whose every tensor is in its files, with the shape that its config says.

    transformers starts what is not there at random and goes on.

    Args:
        auto: one of its ``AutoModel...`` classes.
        name: hub id or folder.
        unread: beginnings of the names of tensors that nobody here reads, so that they may be missing.
        options: further arguments of ``from_pretrained``.

    Raises:
        NotLoaded: saying why.
    """
    asked = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _made(lambda: auto.from_pretrained(name, **asked), options)
    mismatched = [(str(key), tuple(stored), tuple(wanted)) for key, stored, wanted in sorted(info["mismatched_keys"])]
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise NotLoaded(
            f"{_counted(len(mismatched))} in its files with another shape than its config says: {key} is {stored} and "
            f"should be {wanted}"
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unread))
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise NotLoaded(
            f"{_counted(len(missing))} not in its files and would start at random: {', '.join(missing[:SHOWN])}{more}",
            missing,
        )
    return model


def _counted(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _made(make: Callable[[], Made], options: dict[str, Any]) -> Made:
    from torch import OutOfMemoryError

    try:
        return make()
    except (OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"Memory ran out while a model was loaded ({_first_line(error)}): see `maestro-pl estimate`."
        ) from error
    except (
        Exception
    ) as error:  # of whatever kind: files of every state are read here, and code that came with them is run
        raise NotLoaded(_reason(error, options)) from error


def _reason(error: Exception, options: dict[str, Any]) -> str:
    line = _first_line(error)
    if isinstance(error, ImportError):
        package = ATTENTION_PACKAGES.get(str(options.get("attn_implementation")))
        return f"{line}; run `pip install {package}` or choose sdpa" if package else line
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
    return text.rstrip(".")
