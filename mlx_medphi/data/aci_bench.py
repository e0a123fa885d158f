"""ACI-Bench csv files: whole visits with whole notes.

Source: Yim et al., Scientific Data 10:586, 2023; repository wyim/aci-bench, CC BY 4.0. Tags are
`[doctor]`, `[patient]` and `[patient_guest]`; some are swapped by the speech recogniser and its
authors left them so, and so do we. A line without a tag goes on with the turn before it.
"""

from __future__ import annotations

from pathlib import Path

from mlx_medphi.data.examples import Conversation, Example, Note, clean_text
from mlx_medphi.data.reading import Faults, read_csv

__all__ = ["COLUMNS", "METADATA_COLUMNS", "SOURCE", "read"]

SOURCE = "aci-bench"
COLUMNS = ("dataset", "encounter_id", "dialogue", "note")
METADATA_COLUMNS = ("dataset", "encounter_id", "patient_familyname")

# Official file names: train, valid, clinicalnlp_taskB_test1, clinicalnlp_taskC_test2,
# clef_taskC_test3.
_SPLITS = ("train", "valid", "test1", "test2", "test3")


def read(path: Path) -> list[Example]:
    """Read one ACI-Bench csv; the split follows from the official file name, else there is none.

    Raises:
        DataError: the file is not such a csv, or rows are empty or have an id twice.
    """
    split = next((name for name in _SPLITS if path.stem.lower().endswith(name)), None)
    faults = Faults(path)
    examples: list[Example] = []
    seen: set[str] = set()
    for row in read_csv(path, COLUMNS):
        name = row.fields["encounter_id"].strip()
        where = f"line {row.line} (encounter_id {name[:40]})"
        example = Example(
            id=f"{SOURCE}/{split or path.stem}/{name}",
            source=SOURCE,
            conversation=Conversation.from_text(row.fields["dialogue"]),
            note=Note(clean_text(row.fields["note"])),
            split=split,
            group=f"{SOURCE}/{name}",
        )
        if not name:
            faults.add(where, "the encounter_id is empty")
        elif example.id in seen:
            faults.add(where, "the encounter_id occurs twice")
        if not example.note.text:
            faults.add(where, "the note is empty")
        if not example.conversation.turns:
            faults.add(where, "the dialogue is empty")
        seen.add(example.id)
        examples.append(example)
    faults.raise_if_any("Expected an encounter_id, a dialogue and a note in every row.")
    return examples
