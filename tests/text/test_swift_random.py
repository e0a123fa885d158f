"""The digests that Swift's tests compare with are those of this package."""

import json

import pytest
from fixtures.make_swift_random import FOLDERS, GROUPS, HERE, Cases


@pytest.mark.parametrize("name", FOLDERS)
def test_the_recorded_digests_are_of_this_tokenizer(name: str) -> None:
    if not FOLDERS[name].is_dir():
        pytest.skip("Phi-3's tokenizer is not beside the checkout")
    value = json.loads((HERE / "swift" / f"random-{name}.json").read_text(encoding="utf-8"))
    cases = Cases(FOLDERS[name], value["pools"], value["seed"])
    for group in GROUPS:
        assert cases.digests(group, 100) == value[group][:800]
