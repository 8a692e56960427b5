"""Silence what a user of the command line cannot act on, and say the rest in one sentence.

Nothing heavy is imported here: what libraries say while they are imported is to be silenced as well.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from maestro_pl.cli.text import headed

_NOISE = (
    r"LightningCLI's args parameter is intended",
    r".*does not have many workers.*",
    r".*Consider increasing the value of the `num_workers`.*",
    r".*smaller than the logging interval.*",
    r"Using ModelCheckpoint with manual optimization",
    r"Experiment logs directory .* exists and is not empty",  # `_claim` has refused folders that hold a run
    r"Checkpoint directory .* exists and is not empty",
    r"Total length of `list` across ranks is zero",  # no validation prompts, which the data module says in its own words
    r"The dirpath has changed from",  # every run has its own folder
    r".*treespec, LeafSpec.*",
    r"Found \d+ module\(s\) in eval mode",  # the frozen base; the module sets its own mode
    r"You have overridden `on_before_batch_transfer` in `LightningModule`",  # it forgets what was logged, and moves nothing
    r"It is recommended to use `self\.log\(.*sync_dist=True",  # what is logged is that of all ranks already
    r"`torch\.distributed\.reduce_op` is deprecated",  # asked for while vLLM is imported
    r"`is_gradient_checkpointing` is deprecated",  # PEFT asks for it under transformers' old name
)
_TIPS = (
    "Tip:",
    "available: False",
    "`Trainer.fit` stopped: `max_steps=",
    "was raised with message",
    "KeyboardInterrupt",
)


def quiet() -> None:
    """Silence what a user of the command line cannot act on; warnings become one sentence, without a line of source.

    Call it before the command's modules are imported, because bitsandbytes speaks while it is, and once more after,
    because Lightning formats warnings in its own way from then on and transformers' bars cannot be stopped earlier.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    if os.environ.get("MAESTRO_DEBUG", "0") in ("", "0"):
        warnings.formatwarning = _one_sentence
    if not sys.stderr.isatty() and "transformers" in sys.modules:  # bars of loaded weights would fill a log file
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tips)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_hint)  # of no use on any other machine
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast_hint)  # one line a layer and pass


def _one_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return headed("warning", str(message)) + "\n"


def _no_tips(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(noise in text for noise in _TIPS)


def _no_kernel_hint(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


def _no_cast_hint(record: logging.LogRecord) -> bool:
    return "will be cast from" not in record.getMessage()
