"""Speaker tags: every variant and typo a source uses becomes one canonical name.

Canonical names are MTS-Dialog's own (`Doctor`, `Patient`, `Guest_family`, `Guest_clinician`), plus
`Interpreter` and `Speaker` for transcripts that only number their voices; a further voice of the
same kind carries a number, as in `Doctor_2`.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache

__all__ = ["CANONICAL_SPEAKERS", "canonical_speaker", "is_canonical", "split_tag"]

CANONICAL_SPEAKERS = (
    "Doctor",
    "Guest_clinician",
    "Guest_family",
    "Interpreter",
    "Patient",
    "Speaker",
)

_WORDS = {
    "Doctor": "doctor dr doc physician clinician gp provider d",
    "Patient": "patient pt p",
    # [patient_guest] is ACI-Bench's tag for whoever came along with the patient.
    "Guest_family": (
        "guest_family patient_guest guest family family_member mother mom mum father dad parent "
        "wife husband spouse partner son daughter brother sister grandmother grandfather carer "
        "caregiver guardian friend"
    ),
    "Guest_clinician": (
        "guest_clinician nurse medical_assistant physician_assistant pharmacist paramedic student "
        "therapist"
    ),
    "Interpreter": "interpreter translator",
    "Speaker": "speaker spk sp",
}
_BY_WORD = {word: name for name, words in _WORDS.items() for word in words.split()}
# Only long names are matched loosely: of short ones, half of English is a near miss.
_LOOSE = ("doctor", "patient", "guest_family", "guest_clinician")
# "Docotr" scores 5/6 against "Doctor", the farthest of the typos in MTS-Dialog.
_LOOSE_CUTOFF = 0.83

_BRACKET_TAG = re.compile(r"\s*\[([A-Za-z][A-Za-z_ ]{0,23}\d{0,2})\]\s*:?\s*")
_COLON_TAG = re.compile(r"\s*([A-Za-z][A-Za-z_ ]{0,23}\d{0,2}) ?\s*:\s*")
# A dot for the colon is believed only after a tag that cannot be the last word of a sentence.
_DOT_TAG = re.compile(r"\s*([A-Za-z]{3,}_[A-Za-z]{4,}(?:_?\d)?)\.\s+")


@lru_cache(maxsize=4096)
def canonical_speaker(tag: str) -> str | None:
    """The canonical name of a speaker tag, or None when the words are not a known speaker.

    >>> canonical_speaker("Guest_family2"), canonical_speaker("docotr 2"), canonical_speaker("Plan")
    ('Guest_family_2', 'Doctor_2', None)
    """
    key = re.sub(r"[\s_]+", "_", tag.strip().lower())
    match = re.fullmatch(r"(.*?)_?(\d{1,2})?", key)
    assert match is not None
    word, number = match.group(1), match.group(2)
    name = _BY_WORD.get(word)
    if name is None:
        close = get_close_matches(word, _LOOSE, n=1, cutoff=_LOOSE_CUTOFF)
        if not close:
            return None
        name = _BY_WORD[close[0]]
    return f"{name}_{int(number)}" if number else name


def is_canonical(speaker: str) -> bool:
    """Whether `speaker` is a canonical name, with or without a number."""
    return re.sub(r"_[1-9]\d?$", "", speaker) in CANONICAL_SPEAKERS


def split_tag(line: str) -> tuple[str, str] | None:
    """Split `"Doctor: Hello"` or `"[doctor] Hello"` into the canonical speaker and the rest.

    Returns None for a line that does not start with a known speaker.
    """
    for pattern in (_BRACKET_TAG, _COLON_TAG, _DOT_TAG):
        match = pattern.match(line)
        if match:
            speaker = canonical_speaker(match.group(1))
            if speaker:
                return speaker, line[match.end() :].rstrip()
    return None
