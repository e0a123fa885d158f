"""What people read in a bundle: the card, the licence, the notice."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import GRAPH, MINI, make_bundle, make_facts, read_config, signatures

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.bundle_base import (
    UNKNOWN_TERMS,
    Base,
    Licence,
    describe_base,
    find_licence,
)
from mlx_medphi.coreml.bundle_card import card
from mlx_medphi.coreml.bundle_facts import terms
from mlx_medphi.coreml.bundle_text import licence_text, notice_text, readable, stored_as
from mlx_medphi.coreml.manifest import AdapterEntry, Verification
from mlx_medphi.coreml.manifest_build import build_manifest
from mlx_medphi.coreml.manifest_program import Quantization, Stored

TRAINING = {"rows": 320, "updates": 80, "valid_loss": 0.25, "valid_loss_before": 1.5}
SOAP = AdapterEntry("soap", "adapters/soap.safetensors", "0" * 64, 8, {}, TRAINING)


def made(**changes: Any) -> str:
    return card(build_manifest(make_facts(**{"adapters": (SOAP,), **changes})))


def table(text: str) -> Mapping[str, str]:
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)
    return dict(reversed(rows))  # the heads of other tables come later


def test_the_card_says_what_it_is_and_what_it_is_not(tmp_path: Path) -> None:
    text = (make_bundle(tmp_path / "notes.medphi").path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# notes\n")
    assert "not a medical device" in text
    assert "must be read and corrected by a clinician" in text
    facts = table(text)
    assert facts["base"].startswith("owner/base, fingerprint abababababababab")
    assert facts["package"] == "16.7 kB"
    assert facts["weights"] == "4 bits, groups of 64; embedding 8 bits, head 8 bits"
    assert facts["context"].startswith("512 tokens")
    assert facts["keys and values"].startswith("786.4 kB")
    assert facts["runs on"] == "iOS 18.0, macOS 15.0 and later; advised: cpu_and_gpu"
    assert facts["file"] == "adapters/soap.safetensors, 400 bytes"
    assert "Weights: mit." in text


@pytest.mark.parametrize(
    ("verification", "says", "apple"),
    [
        (Verification(), "Not verified.", False),
        (Verification("spec", {"operations": 9}), "read back", False),
        (GRAPH, "computed step by step", False),
        (replace(GRAPH, level="predict", predict={"max_abs": 0.01}), "Core ML itself", True),
    ],
)
def test_the_card_claims_no_more_than_was_verified(
    verification: Verification, says: str, apple: bool
) -> None:
    text = made(verification=verification)
    assert says in text
    assert ("It has not run on Apple hardware." in text) != apple


def test_the_card_shows_the_figures_of_each_level() -> None:
    case = {"name": "note-base", "top1": 1.0, "kl": 3.25e-7, "max_abs": 0.0042}
    figures = {"kl": 1.25e-7, "top1": 1.0, "finite": True, "cases": [case], "prompts": 3}
    text = made(verification=Verification("graph", {"operations": 12}, figures))
    assert "| note-base | 1 | 3.25e-07 | 0.0042 |" in text and "those before" not in text
    facts = table(text)
    assert facts["operations"] == "12" and facts["kl"] == "1.25e-07"
    assert facts["finite"] == "yes" and facts["prompts"] == "3"
    assert "cases" not in facts


def test_the_card_tells_what_an_adapter_was_trained_on() -> None:
    facts = table(made())
    assert facts["conversations with notes"] == "320" and facts["updates"] == "80"
    assert facts["validation loss before"] == "1.5" and facts["validation loss after"] == "0.25"
    untold = replace(SOAP, training={})
    assert table(made(adapters=(untold,)))["training"] == "its file says nothing of it"


def test_facts_that_nobody_measured_are_left_out() -> None:
    trained = {**TRAINING, "valid_loss": None, "secret": "/home/x"}
    text = made(adapters=(replace(SOAP, training=trained),))
    assert "validation loss after" not in text and "secret" not in text


def test_the_card_tells_how_to_call_what_is_there_and_no_more() -> None:
    text = made()
    for name in ("inputIds", "position", "causalMask", "lastIndex", "logits", "parity.json"):
        assert f"- `{name}`: " in text
    assert "Adapter slots: fill each" in text and "`ropeRow`" not in text
    fused = made(export=ExportConfig(adapters="fused"), slot_rank=None)
    assert "Adapter slots" not in fused


def test_the_card_tells_the_ways_of_carrying_adapters_apart() -> None:
    assert "slots of rank 16, filled at run time" in made()
    fused = {"export": ExportConfig(adapters="fused"), "slot_rank": None}
    assert "soap; folded into the weights" in made(**fused)
    assert "| adapters | none |" in made(**fused, adapters=())
    functions = signatures(read_config(MINI), 512)
    functions |= {f"{name}_soap": functions[name] for name in ("decode", "prefill")}
    own = {name: f"{name}_soap" for name in ("decode", "prefill")}
    text = made(
        functions=functions,
        export=ExportConfig(adapters="functions"),
        slot_rank=None,
        adapters=(replace(SOAP, functions=own, path=None, sha256=None),),
    )
    assert "| functions | decode_soap, prefill_soap |" in text and "adapters/" not in text


def test_limits_name_the_window_and_the_switch_of_factors_where_they_matter() -> None:
    config = read_config(MINI)
    assert "itself among them" not in made()
    assert "20 tokens, itself among them" in made(config=replace(config, sliding_window=20))
    long = read_config(MINI.parent / "longrope-long")
    assert long.switch_length is not None
    context = (long.switch_length // 64 + 1) * 64
    text = made(config=long, context=context, functions=signatures(long, context))
    assert f"past {long.switch_length} tokens, all of it is read anew" in text
    assert "read anew" not in made()


def test_names_cannot_break_the_card() -> None:
    text = made(base=Base("a|b`c`\n# d", "f" * 64), name="x\n## y | z")
    assert "\n# d" not in text and "\n## y" not in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))


def test_no_text_of_a_bundle_tells_about_the_machine(tmp_path: Path) -> None:
    made_here = make_bundle(tmp_path / "notes.medphi")
    words = {str(tmp_path), str(MINI), str(Path.home()), socket.gethostname()}
    words |= {word for word in (f"/{getpass.getuser()}/", tmp_path.name) if len(word) > 3}
    for name in ("README.md", "LICENSE", "NOTICE", "metadata.json", "generation_config.json"):
        text = (made_here.path / name).read_text(encoding="utf-8")
        assert not [word for word in words if word in text], name


def test_sizes_are_written_for_people() -> None:
    assert [readable(n) for n in (0, 999, 1000, 25_200_000, 2_154_000_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "25.2 MB", "2.15 GB",
    ]  # fmt: skip


def test_forms_of_weights_are_told_apart() -> None:
    half, eight = Stored(16, None), Stored(8, 64)
    plain = Quantization("none", "block", 16, None, "none", half, half, {}, None, 0)
    assert stored_as(plain) == "float16; embedding float16, head float16"
    rows = replace(plain, bits=8, scheme="channel", group=64, embedding=eight)
    assert stored_as(rows) == "8 bits, one scale per row; embedding 8 bits, head float16"


MIT = "Owner.\nCopyright (c) Owner.\n\nMIT License\n\nPermission is granted.\n"


def test_a_licence_beside_the_base_is_copied(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text(MIT)
    found = find_licence(tmp_path)
    assert found == Licence("mit", MIT.strip("\n"))
    assert licence_text(Base("b", "f", None, found), "mit") == MIT


def test_every_licence_file_is_taken_and_nothing_else(tmp_path: Path) -> None:
    for name in ("COPYING", "LICENCE", "license-data.md", "LICENSED_USERS.md", "unlicensed"):
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "LICENSE").mkdir()
    text = find_licence(tmp_path).text
    assert text == "text of COPYING\n\ntext of LICENCE\n\ntext of license-data.md"


@pytest.mark.parametrize(
    ("card_text", "found"),
    [
        ("---\nlicense: MIT\ntags:\n- x\n---\n# Card\n", "mit"),
        ("---\nlanguage: en\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: phi\n---\n", "phi"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("# Card\n\nlicense: mit\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_model_cards_licence_is_that_of_its_front_matter(
    tmp_path: Path, card_text: str, found: str | None
) -> None:
    (tmp_path / "README.md").write_bytes(card_text.encode())
    assert find_licence(tmp_path) == Licence(found, None)


def test_terms_are_never_guessed(tmp_path: Path) -> None:
    base = Base("microsoft/Phi-3-mini-4k-instruct", "f" * 64, None, find_licence(tmp_path))
    facts = make_facts(base=base)
    assert terms(facts) == UNKNOWN_TERMS
    assert "look at the base's page" in licence_text(base, terms(facts))
    assert build_manifest(facts).source.licence == UNKNOWN_TERMS


def test_the_settings_word_on_terms_wins() -> None:
    facts = make_facts(export=ExportConfig(licence="research only"))
    assert terms(facts) == "research only"
    assert "Its terms: research only." in licence_text(facts.base, terms(facts))


def test_files_too_large_for_a_licence_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_bytes(b"x" * ((1 << 20) + 1))
    assert find_licence(tmp_path) == Licence()


def test_the_notice_names_base_adapters_and_their_terms() -> None:
    text = notice_text(build_manifest(make_facts(adapters=(SOAP,))))
    assert "owner/base, revision c0ffee" in text and "Terms: mit." in text
    assert "what training added (soap)" in text
    alone = notice_text(build_manifest(make_facts(base=Base("b", "f" * 64))))
    assert "training added" not in alone and "revision" not in alone


def test_a_fetched_base_is_named_by_its_id_and_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--phi" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "LICENSE").write_text("MIT License")
    base = describe_base(folder, "f" * 64, asked="owner/phi", revision="main")
    assert base == Base("owner/phi", "f" * 64, commit, Licence("mit", "MIT License"))
    single = folder / "model.safetensors"
    single.write_bytes(b"")
    assert describe_base(single, "f" * 64).licence.id == "mit"


def test_a_local_base_is_named_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "my-phi").mkdir()
    base = describe_base(tmp_path / "my-phi", "f" * 64, asked=str(tmp_path / "my-phi"))
    assert base == Base("my-phi", "f" * 64)
