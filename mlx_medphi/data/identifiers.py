"""A first screen for personal identifiers, before anything is trained on.

It knows patterns, not people: names without a title or an introduction and places need a lexicon
and are missed, so an empty result proves nothing. It reports categories and row ids, never text.
Placeholders of de-identified files (`Dr. X`, `Dr. ABC`, `XYZ`) and UK shorthand for durations
(`4/7` days, `2/52` weeks, `1/12` months, pain `8/10`) are not identifiers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_medphi.data.examples import Example

__all__ = ["CATEGORIES", "Screening", "find_identifiers", "screen"]

_MONTH = (
    r"(?:[Jj]an(?:uary)?|[Ff]eb(?:ruary)?|Mar(?:ch)?|[Aa]pr(?:il)?|May|[Jj]une?|[Jj]uly?"
    r"|[Aa]ug(?:ust)?|[Ss]ept?(?:ember)?|[Oo]ct(?:ober)?|[Nn]ov(?:ember)?|[Dd]ec(?:ember)?)\.?"
)
_NTH = r"(?:3[01]|[12][0-9]|0?[1-9])(?:st|nd|rd|th)"
_DAY = rf"(?:{_NTH}|3[01]|[12][0-9]|0?[1-9])"
_YEAR = r"(?:1[89]|20)[0-9]{2}"
_DATE = re.compile(
    r"(?<![0-9/.-])(?:"
    rf"{_YEAR}[-/](?:1[0-2]|0?[1-9])[-/](?:3[01]|[12][0-9]|0?[1-9])"
    rf"|(?P<first>[0-9]{{1,2}})(?P<sep>[-/.])(?P<second>[0-9]{{1,2}})(?P=sep)(?:{_YEAR}|[0-9]{{2}})"
    rf"|(?:1[0-2]|0?[1-9])/{_YEAR}"
    r")(?![0-9/]|[.-][0-9])"
    rf"|\b{_MONTH}\s+{_DAY}\b(?!\s*(?:mg|mcg|ml|times|tablets?|per)\b)"
    rf"|\b{_DAY}\s+(?:of\s+)?{_MONTH}(?!\w)"
    # In lower case these two are verbs, unless a number of the month stands beside them.
    rf"|\b(?:may|march)\s+{_NTH}\b|\b{_NTH}\s+(?:of\s+)?(?:may|march)\b"
    rf"|\b(?:{_MONTH}|may|march),?\s+(?:of\s+)?{_YEAR}\b"
)
_AGE = re.compile(
    r"\b(?:9[0-9]|1[01][0-9])\s*[- ]?\s*(?:years?|yrs?|y/?o\b|y\.o\.)(?:[- ]?(?:olds?|of age))?"
    r"|\b(?:aged?|age of|age:)\s+(?:9[0-9]|1[01][0-9])\b(?!\s*(?:%|mg|days|weeks|months))"
    r"|\b(?:ninety|one hundred|a hundred)(?:[- ](?:and )?(?:one|two|three|four|five|six|seven"
    r"|eight|nine))?[- ]years?[- ](?:olds?|of age)\b",
    re.IGNORECASE,
)
_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ])(?!00)\d{2}\1(?!0000)\d{4}(?![\d-])")
_TEN = re.compile(r"(?<![\d+-])\d{3}[ -]?\d{3}[ -]?\d{4}(?![\d-])")
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
_RECORD = re.compile(
    r"\b(?:MRN|medical record|record|hospital|patient|account|acct|policy|member|licen[cs]e"
    r"|insurance|case|chart|registration)\s*(?:numbers?|no\.?|num|id|#)?\s*(?:is|:|#)?\s*"
    r"(?=[A-Z]{0,3}[-]?\d)[A-Z]{0,3}-?\d(?:-?\d){4,}\b"
    r"|(?<![\d.,/-])\d{7,12}(?![\d.,/-]*\d)",
    re.IGNORECASE,
)
_PHONE = re.compile(
    r"(?<![\d.-])(?:(?:\+?1[-. ]?)?\(?[2-9]\d{2}\)?[-. ]\s?\d{3}[-. ]\d{4}"
    r"|\+\d{1,3}(?:[- ]?\(?\d\)?){8,12}"
    r"|\(?0(?:7\d{3}|[12]\d{2,4}|20|800)\)?[- ]?\d{3,4}[- ]?\d{3,4})(?![\d-])"
    r"|\b(?:phone|call|fax|tel|telephone|mobile|cell|pager)\b[^.\d]{0,20}\d{3}[-. ]\d{4}\b",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"\b[\w.+-]+\s?@\s?[\w-]+(?:\.[\w-]+)+\b")
_URL = re.compile(r"\b(?:https?://|www\.)\S+|\b[a-z0-9-]+\.(?:com|org|net|co\.uk|nhs\.uk|gov)\b")
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IP = re.compile(rf"(?<![\d.])(?:{_BYTE}\.){{3}}{_BYTE}(?!\d|\.\d)")
_INTRODUCED = re.compile(
    r"\b(?:(?:(?i:my (?:full |first |last |sur)?name(?:'s| is)|(?:his|her|patient) name is)\s+"
    r"(?:(?i:uh|um|er),?\s+)*"
    r"(?:(?i:dr|doctor|nurse|mr|mrs|ms|miss)\b\.?\s+)?"
    r"|(?i:i'm|i am|this is|it's)\s+(?i:dr|doctor|nurse|mr|mrs|ms)\b\.?\s+)"
    r"(?P<name>[A-Za-z][A-Za-z'’-]*)"
    r"|(?i:i am called|i'm called|call me)\s+(?P<called>[A-Z][a-z'’-]+))"
)
_TITLED = re.compile(
    r"\b(?:(?:(?:Dr|Drs|Mr|Mrs|Ms|Prof)\b\.?|(?:dr|mr|mrs|ms|prof)\.)\s+"
    r"(?P<name>[A-Za-z][A-Za-z'’-]*)"
    # Spelled out, a title is also an ordinary word: only a capital after it makes a name.
    r"|(?:Doctor|Miss|Professor|Nurse)\s+(?P<called>[A-Z][A-Za-z'’-]*))"
)
# How notes and dictated summaries begin: "Anna Example is a pleasant 50-year-old".
_DESCRIBED = re.compile(
    r"\b(?P<name>[A-Za-z][A-Za-z'’-]*),? (?:is|was) an? (?:[a-z]+ ){0,2}"
    r"\d{1,3}[- ]years?[- ]old"
)
# Letters that stand for a name: one letter, initials, or the usual stand-ins in any case.
_STAND_IN = re.compile(r"[A-Za-z]|[A-Z]{2,4}|(?i:x+y*z*|abcd?|doe|so-and-so)")
# Words that stand beside a title, "my name is" or "is a 50-year-old" without being a name.
_NOT_NAMES = frozenset(
    """
    a about absolutely actually after again all alright am an and any are as ask at baby back be
    because been boy brother but by call can child come could daughter dear did do doctor does
    doing dr father female for from general gentleman get girl go going gonna good great had has
    have he hello her here hi him his how however husband i if in infant is it its just know
    lady later let like look make male man may maybe me miss more mother mr mrs ms my need no
    not now nurse of oh ok okay on one or our out patient person please practitioner
    practitioners really right said says she should sister so some son soon sorry spelled sure
    take tell thank thanks that the them then there they this to today told tomorrow too uh um
    unit very victim was we well were what when whenever where which who why wife will with
    woman would yeah yep yes yesterday you your yours
    """.split()
)


def _luhn(digits: str) -> bool:
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0 and len(set(digits)) > 1


def _nhs(digits: str) -> bool:
    """The NHS number's check digit, modulo 11."""
    check = 11 - sum(int(d) * (10 - i) for i, d in enumerate(digits[:9])) % 11
    return check % 11 == int(digits[9]) and check != 10 and len(set(digits)) > 1


def _is_date(match: re.Match[str]) -> bool:
    if match["first"] is None:
        return True
    first, second = int(match["first"]), int(match["second"])
    # Day and month in either order; a dotted pair needs a full year, or it is a version or a score.
    in_range = 1 <= min(first, second) <= 12 and 1 <= max(first, second) <= 31
    return in_range and (match["sep"] != "." or re.search(r"\d{4}$", match[0]) is not None)


def _is_name(match: re.Match[str]) -> bool:
    name = next(group for group in match.groupdict().values() if group)
    bare = re.sub(r"'s$", "", name.replace("’", "'"))
    # "I'm" and "we've" end in a contraction, O'Neil does not.
    contraction = "'" in bare[-3:]
    return not (contraction or _STAND_IN.fullmatch(bare) or bare.lower() in _NOT_NAMES)


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _always(match: re.Match[str]) -> bool:
    return True


# In this order: a span claimed by an earlier category is not counted again by a later one.
_RULES = (
    ("email", _EMAIL, _always),
    ("url", _URL, _always),
    ("ip_address", _IP, _always),
    ("date", _DATE, _is_date),
    ("card_number", _CARD, lambda match: _luhn(_digits(match))),
    ("ssn", _SSN, _always),
    ("nhs_number", _TEN, lambda match: _nhs(_digits(match))),
    ("phone", _PHONE, _always),
    ("record_number", _RECORD, _always),
    ("age_over_89", _AGE, _always),
    ("described_name", _DESCRIBED, _is_name),
    ("introduced_name", _INTRODUCED, _is_name),
    ("titled_name", _TITLED, _is_name),
)
# Most conversations have no digit at all, and then only these can find anything.
_WORDED = frozenset({"email", "url", "age_over_89", "introduced_name", "titled_name"})
CATEGORIES: tuple[str, ...] = tuple(sorted(name for name, _, _ in _RULES))


@dataclass(frozen=True)
class Screening:
    """How many identifiers of each category were found, and in which rows."""

    counts: Mapping[str, int]
    rows: Mapping[str, tuple[str, ...]]

    @property
    def found(self) -> bool:
        """Whether anything was found at all."""
        return any(self.counts.values())

    @property
    def row_ids(self) -> tuple[str, ...]:
        """Every row in which something was found, sorted."""
        return tuple(sorted({row for rows in self.rows.values() for row in rows}))


def find_identifiers(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (category, start, end) for each identifier in `text`; spans do not overlap."""
    taken: list[tuple[int, int]] = []
    has_digit = re.search(r"[0-9]", text) is not None
    for category, pattern, accept in _RULES:
        if not has_digit and category not in _WORDED:
            continue
        for match in pattern.finditer(text):
            start, end = match.span()
            if accept(match) and not any(start < e and s < end for s, e in taken):
                taken.append((start, end))
                yield category, start, end


def screen(examples: Sequence[Example]) -> Screening:
    """Screen the conversation and the note of every example, and its own messages if it has any."""
    counts = dict.fromkeys(CATEGORIES, 0)
    rows: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for example in examples:
        found = [category for category, _, _ in find_identifiers(_text(example))]
        for category in found:
            counts[category] += 1
        for category in sorted(set(found)):
            rows[category].append(example.id)
    return Screening(counts, {category: tuple(ids) for category, ids in rows.items()})


def _text(example: Example) -> str:
    if example.messages is not None:
        parts = [message.content for message in example.messages]
    else:
        parts = [turn.text for turn in example.conversation.turns] + [example.note.text]
    # A bar between them, so that no pattern reaches from one speaker's words into another's.
    return "\n|\n".join(parts)
