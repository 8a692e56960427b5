"""A language model as a judge, behind an OpenAI-compatible server or on this machine."""

from maestro_pl.evaluation.judge.backend import Ask, Failure, JudgeBackend, Outcome, Reply
from maestro_pl.evaluation.judge.cache import JudgeCache
from maestro_pl.evaluation.judge.core import Judge, JudgeCounts, Judgement
from maestro_pl.evaluation.judge.endpoint import Endpoint
from maestro_pl.evaluation.judge.local import LocalJudge
from maestro_pl.evaluation.judge.prompts import Case, JudgePrompt, load_prompts

__all__ = [
    "Ask",
    "Case",
    "Endpoint",
    "Failure",
    "Judge",
    "JudgeBackend",
    "JudgeCache",
    "JudgeCounts",
    "JudgePrompt",
    "Judgement",
    "LocalJudge",
    "Outcome",
    "Reply",
    "load_prompts",
]
