"""Which questions ask for a number of things: people expect a model that points to point at what it counts.

The released models answer such a question with points unless they are told not to, so a question whose answer has no
points is trained with such a request in front or behind (data.md 5.5).  High recall matters more than precision.
"""

from __future__ import annotations

import re

_ASKS = re.compile(
    r"\bhow many\b|\bcount (?:all|every|each|the|up)\b|\bnumber of\b|\b(?:there (?:is|are)|total of) _{2,}"
)
_MEASURES = re.compile(
    r"\bhow many (?:more |of )?"
    r"(?:seconds|minutes|hours|days|weeks|months|years|decades|times|degrees|percent|percentage|calories|grams?|"
    r"kilograms?|kilos|pounds|ounces|tons|liters?|litres?|gallons|cups|inches|feet|yards|miles|meters?|metres?|"
    r"kilometers?|kilometres?|centimeters?|dollars|euros|cents|points|votes|megabytes|gigabytes|watts|volts)\b"
)


def asks_for_count(question: str) -> bool:
    """Whether `question` asks for a number of things that could be pointed at."""
    text = " ".join(question.lower().split())
    return not text.startswith("approximately") and bool(_ASKS.search(text)) and not _MEASURES.search(text)
