"""What an answer in multiple choice turns down: "B is wrong since ...", "not B", "we can rule out A and C", "B?"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_VERB = r"(?:is|are|was|were|seems?|looks?|appears?|can|could|would|should|might|may|must|does|do|did|has|have|will)"
_ADVERB = (
    r"(?:clearly|also|simply|just|probably|definitely|obviously|certainly|therefore|thus|all|both|quite|very|rather|highly"
    r"|totally|completely|entirely|most|more|somewhat|be|to|been|being|easily|safely|all|a|an|the)"
)
_BAD = (
    r"(?:not|wrong|incorrect|unlikely|implausible|irrelevant|out|false|eliminated|excluded|rejected|dismissed|discarded|ruled"
    r"|too|less|never|unsupported|impossible|inaccurate|inappropriate|distractors?|unrelated|mistaken)"
)
_REFUSED = (  # what stands behind the options that are turned down
    rf"(?:\s+{_VERB}(?:\s+{_ADVERB}){{0,3}}\s+{_BAD}\b|\s+(?:\w+n't|cannot)\b|\s+(?:contradicts?|fails?|misses|lacks?)\b"
    r"|\s*[:\-\u2013\u2014]\s*(?:no|wrong|incorrect|false|not)\b"
    r"|\s*(?:\u4e0d\u5bf9|\u4e0d\u6b63\u786e|\u9519|\u662f\u9519))"
)
_REFUSING = (  # what stands in front of them
    r"(?:rul(?:e|ed|es|ing)\s+out|eliminat(?:e|ed|es|ing)|exclud(?:e|ed|es|ing)|reject(?:s|ed|ing)?|discard(?:s|ed|ing)?"
    r"|dismiss(?:es|ed|ing)?|cross(?:ed|ing)?\s+out|(?:everything|anything|all|any)\s+(?:but|except)|unlike|besides"
    r"|(?:\w+n't|cannot|not|never)(?:\s+(?:think|believe|choose|pick|select|say|go\s+with|be|that|it|its|it's|the\s+answer"
    r"|is|would\s+be|should\s+be|was|feel|seem|look|at\s+all|really|very)){0,4}|far\s+from|no\s+longer"
    r"|(?:hardly|scarcely|barely)(?:\s+(?:seems?|feels?|looks?))?"
    r"|(?:wrong|incorrect|worst|false|least\s+\w+)(?:\s+(?:answers?|options?|choices?|ones?))?\s*(?::|is\b|are\b|would\s+be\b)"
    r"|neither|nor|rather\s+than|instead\s+of|\u4e0d\u662f|\u4e0d\u9009|\u6392\u9664)"
)
_CLAUSE_ENDS = (  # where what is said against an option stops
    r"(?=[.;!\n\u3002\uff1b]|,\s*(?:so|but|hence|thus|therefore|while|whereas|yet|the\s+(?:\w+\s+){0,2}(?:answer|option|choice)"
    r"|it\b|it's|its|i\b|my\b|(?:option\s+|choice\s+)?\(?(?-i:[A-Z])\b)|\s+(?:but|so|while|whereas|hence|therefore)\s|$)"
)
_ENDS = re.compile(r"([.;!?\n\u3002])")


def without_refusals(answer: str, options: Sequence[str]) -> str:
    """The answer without what it says against options, and without its questions.

    Args:
        answer: any text.
        options: the texts of the options.
    """
    behind, before = _patterns(tuple(options))
    if not any("?" in option for option in options):
        answer = _without_questions(answer)
    answer = behind.sub(" ", answer)
    return before.sub(" ", answer)


def _without_questions(answer: str) -> str:
    if "?" not in answer:
        return answer
    pieces = _ENDS.split(answer)  # text, mark, text, mark, ...
    marks = [*pieces[1::2], ""]
    return "".join(" " if mark == "?" else text + mark for text, mark in zip(pieces[::2], marks, strict=True))


@lru_cache(maxsize=256)
def _patterns(options: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    texts = "|".join(re.escape(text) for text in sorted(options, key=len, reverse=True) if len(text) > 1)
    last = chr(ord("A") + len(options) - 1)
    letter = rf"(?<![A-Za-z0-9'.&])(?-i:[A-{last}])(?![\w'])"
    text = rf"(?<![A-Za-z0-9])(?:{texts})(?![A-Za-z0-9])" if texts else letter
    one = (
        rf"(?:(?:the\s+)?(?:options?|choices?|answers?|letters?|\u9009\u9879)\s*)?"
        rf"[(\"'\[]*(?:{letter}[)\"'\]]*(?:\s*[:.)(]\s*\(?{text}[)\"']*)?|{text}[)\"']*)"
    )
    several = rf"{one}(?:\s*(?:,\s*(?:and|or|nor)?|and|or|nor|/|&|\u3001|\u548c)\s*{one}){{0,25}}"
    behind = re.compile(rf"{several}{_REFUSED}.*?{_CLAUSE_ENDS}", re.IGNORECASE | re.DOTALL)
    before = re.compile(rf"(?<![A-Za-z]){_REFUSING}\s*{several}", re.IGNORECASE)
    return behind, before
