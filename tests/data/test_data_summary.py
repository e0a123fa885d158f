from __future__ import annotations

from mlx_medphi.data.summary import Spread, spread, summarise


def test_spread_of_known_counts() -> None:
    assert spread(range(1, 101)) == Spread(50.5, 50.5, 95, 100)
    assert spread([3, 1, 2]) == Spread(2.0, 2.0, 3, 3)
    assert spread([]) == Spread(0.0, 0.0, 0, 0)


def test_a_summary_counts_words_without_tags_and_sections_by_frequency(example) -> None:
    rows = [
        example("a", "Doctor: one two\nPatient: three", "x y", section="CC"),
        example("b", section="CC"),
    ]
    found = summarise([*rows, example("c", section="ROS"), example("d")])
    assert found.rows == 4
    assert found.turns == Spread(2.0, 2.0, 2, 2)
    assert found.conversation_words.maximum == 6
    assert found.note_words == Spread(2.0, 2.0, 2, 2)
    assert list(found.sections.items()) == [("CC", 2), ("ROS", 1)]
