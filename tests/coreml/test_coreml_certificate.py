"""The golden logits of a bundle: read as they were written, refused when they cannot be its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_cases import add_adapter, fill_package, make_facts
from safetensors.numpy import load_file, save_file

from mlx_medphi.coreml.bundle_write import draft_bundle
from mlx_medphi.coreml.certificate import (
    GOLDEN_FILE,
    PARITY_FILE,
    check_golden,
    read_golden,
    write_golden,
)
from mlx_medphi.coreml.golden import Case, Golden, Prompt
from mlx_medphi.coreml.manifest import Manifest, Verification, added_adapters
from mlx_medphi.coreml.parity import LIMITS
from mlx_medphi.errors import BundleError
from mlx_medphi.files import read_safetensors_header

# As in mini-4k.
VOCAB = 320


def a_case(name: str = "note", adapter: str | None = None, seed: int = 0) -> Case:
    """A prompt of five tokens that goes on for three; two rows before its end are compared."""
    prompt = Prompt(name, (5, 6, 7, 8, 9), (1, 3), 3)
    logits = np.random.default_rng(seed).standard_normal((5, VOCAB)).astype(np.float32)
    return Case(prompt, adapter, (10, 11, 12), logits)


GOLDEN = Golden((a_case(), a_case(adapter="soap", seed=1)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_golden(tmp_path, GOLDEN)
    return tmp_path


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of a bundle with one adapter in slots and a context of 512 tokens."""
    fill_package(tmp_path / "bundle")
    entry = add_adapter(tmp_path / "bundle")
    return draft_bundle(tmp_path / "bundle", make_facts(adapters=(entry,))).manifest


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite parity.json."""
    path = folder / PARITY_FILE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_golden(folder)
    assert len(found.cases) == 2
    for one, other in zip(found.cases, GOLDEN.cases, strict=True):
        assert (one.name, one.adapter, one.continuation) == (
            other.name, other.adapter, other.continuation
        )  # fmt: skip
        assert one.rows == other.rows == (1, 3, 4, 5, 6)
        assert one.ids == (5, 6, 7, 8, 9, 10, 11)
        assert np.array_equal(one.logits, other.logits)
    assert [case.name for case in found.of("soap")] == ["note-soap"]


def test_the_same_logits_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    write_golden(tmp_path / "again", read_golden(folder))
    for name in (PARITY_FILE, GOLDEN_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_any_program_reads_the_logits(folder: Path) -> None:
    tensors = load_file(folder / GOLDEN_FILE)
    assert set(tensors) == {"note-base", "note-soap"}
    assert tensors["note-base"].dtype == np.float32
    assert np.array_equal(tensors["note-soap"], GOLDEN.cases[1].logits)
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE((folder / n).stat().st_mode) for n in (PARITY_FILE, GOLDEN_FILE)}
    assert modes == {0o666 & ~umask}


def test_the_document_says_what_the_numbers_are(folder: Path) -> None:
    document = json.loads((folder / PARITY_FILE).read_text())
    assert document["schema"] == 1 and document["logits"] == GOLDEN_FILE
    assert document["reference"].endswith("computed in float32")
    assert document["limits"]["note"]["error"] == LIMITS["note"].error
    (first, _) = document["cases"]
    assert first == {
        "name": "note-base", "prompt": "note", "adapter": None, "ids": [5, 6, 7, 8, 9],
        "rows": [1, 3, 4, 5, 6], "continuation": [10, 11, 12],
    }  # fmt: skip


def test_no_logits_are_a_document_and_an_empty_file(tmp_path: Path) -> None:
    write_golden(tmp_path, Golden(()))
    assert read_golden(tmp_path) == Golden(())
    assert not read_safetensors_header(tmp_path / GOLDEN_FILE).tensors


@pytest.mark.parametrize("name", [PARITY_FILE, GOLDEN_FILE])
@pytest.mark.parametrize("data", [None, b"", b"{", b"\xff" * 100, b"[" * 100_000])
def test_a_damaged_file_is_one_line(folder: Path, name: str, data: bytes | None) -> None:
    (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    text = refused(lambda: read_golden(folder))
    assert str(folder) in text and "cannot be read" in text


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_asks_for_an_update(folder: Path, schema: Any) -> None:
    changed(folder, lambda document: document.update(schema=schema))
    assert "not a certificate of schema 1; update mlx_medphi" in refused(
        lambda: read_golden(folder)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case.pop("ids"),
        lambda case: case.update(ids=[]),
        lambda case: case.update(ids=[-1, *case["ids"][1:]]),
        lambda case: case.update(ids="text"),
        lambda case: case.update(ids=[float("inf")]),
        lambda case: case.update(ids=7),
        lambda case: case.update(rows=[-1, *case["rows"][1:]]),
        lambda case: case.update(rows=case["rows"][::-1]),
        lambda case: case.update(rows=[*case["rows"], 7]),
        lambda case: case.update(rows=case["rows"][1:]),
        lambda case: case.update(continuation=[]),
        lambda case: case.update(continuation=[-3, 1, 1]),
        lambda case: case.update(prompt="letter", name="letter-base"),
        lambda case: case.update(name="note-soap"),
        lambda case: case.update(adapter=["soap"], name="note-['soap']"),
        lambda case: case.update(adapter=5, name="note-5"),
        lambda case: case.clear(),
    ],
)
def test_a_case_that_contradicts_its_logits_is_refused(folder: Path, change: Any) -> None:
    tensors = load_file(folder / GOLDEN_FILE)
    logits = tensors["note-base"]
    more = {name: logits for name in ("letter-base", "note-['soap']", "note-5")}
    save_file({**tensors, **more}, folder / GOLDEN_FILE)
    changed(folder, lambda document: change(document["cases"][0]))
    assert "parity.json: damaged" in refused(lambda: read_golden(folder))


@pytest.mark.parametrize("cases", [None, 3, {"a": 1}, [3], ["note"], [None]])
def test_cases_are_a_list_of_objects(folder: Path, cases: Any) -> None:
    changed(folder, lambda document: document.update(cases=cases))
    assert "parity.json: damaged" in refused(lambda: read_golden(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_are_numbers(folder: Path, value: float) -> None:
    tensors = load_file(folder / GOLDEN_FILE)
    tensors["note-soap"][2, 7] = value
    save_file(tensors, folder / GOLDEN_FILE)
    text = refused(lambda: read_golden(folder))
    assert "damaged" in text and "note-soap" in text


def test_logits_of_the_bundle_are_accepted(folder: Path, manifest: Manifest) -> None:
    check_golden(read_golden(folder), manifest, folder)


def recorded(manifest: Manifest, *adapters: str | None, **changes: Any) -> Manifest:
    """The manifest of a bundle whose export compared these."""
    cases = [{"name": f"note-{name or 'base'}", "adapter": name} for name in adapters]
    verification = Verification("graph", {}, {"cases": cases, **changes})
    return replace(manifest, medphi=replace(manifest.medphi, verification=verification))


def test_an_adapter_that_came_after_the_certificate_needs_no_logits(
    folder: Path, manifest: Manifest
) -> None:
    later = recorded(manifest, None)
    assert added_adapters(later) == ("soap",)
    check_golden(Golden((BASE,)), later, folder)
    assert added_adapters(recorded(manifest, None, "soap")) == ()
    # Logits that are there are compared, whatever was compared before.
    check_golden(GOLDEN, later, folder)


def functions(manifest: Manifest) -> Manifest:
    """Adapters built into the package, to which nobody can add one."""
    ours = manifest.medphi
    (entry,) = ours.adapters.list
    entry = replace(entry, functions={"prefill": "prefill_soap", "decode": "decode_soap"})
    adapters = replace(ours.adapters, mode="functions", list=(entry,))
    return replace(manifest, medphi=replace(ours, adapters=adapters))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: recorded(manifest, None, "soap"),
        lambda manifest: recorded(manifest),
        lambda manifest: recorded(manifest, None, cases=None),
        lambda manifest: recorded(manifest, None, cases=["note-base"]),
        lambda manifest: recorded(manifest, None, cases=[{"name": "note-base"}]),
        lambda manifest: recorded(functions(manifest), None),
    ],
)
def test_an_adapter_that_is_not_known_to_be_later_needs_its_logits(
    folder: Path, manifest: Manifest, change: Any
) -> None:
    text = refused(lambda: check_golden(Golden((BASE,)), change(manifest), folder))
    assert "does not fit the bundle: there are no logits of soap" in text


def test_only_slots_take_an_adapter_later(manifest: Manifest) -> None:
    later = recorded(manifest, None)
    for mode in ("functions", "fused", "none"):
        adapters: Any = replace(later.medphi.adapters, mode=mode)
        ours = replace(later.medphi, adapters=adapters)
        assert added_adapters(replace(later, medphi=ours)) == ()


def test_a_certificate_has_every_prompt_of_each_adapter_it_names(
    folder: Path, manifest: Manifest
) -> None:
    both = (*GOLDEN.cases, a_case("edge"), a_case("edge", "soap"))
    for later in (manifest, recorded(manifest, None)):
        check_golden(Golden(both), later, folder)
        text = refused(lambda later=later: check_golden(Golden(both[:-1]), later, folder))
        assert "does not fit the bundle: there is no case edge-soap; export again" in text


def test_the_base_always_needs_its_logits(folder: Path, manifest: Manifest) -> None:
    for golden in (Golden(()), Golden((SOAP,))):
        text = refused(lambda g=golden: check_golden(g, recorded(manifest, None), folder))
        assert "there are no logits of the base" in text


def remade(case: Case, **prompt: Any) -> Golden:
    return Golden((replace(case, prompt=replace(case.prompt, **prompt)), GOLDEN.cases[1]))


BASE, SOAP = GOLDEN.cases


@pytest.mark.parametrize(
    ("golden", "expected"),
    [
        (Golden((BASE,)), "there are no logits of soap"),
        (Golden((SOAP,)), "there are no logits of the base"),
        (Golden(()), "there are no logits of soap, there are no logits of the base"),
        (Golden((*GOLDEN.cases, a_case(adapter="letter"))), "there is no adapter letter"),
        (Golden((replace(BASE, logits=BASE.logits[:, :-1]), SOAP)), "case note-base is of another"),
        (remade(BASE, ids=(5, 6, 7, 8, VOCAB)), "case note-base is of another model"),
        (Golden((replace(BASE, continuation=(1, 2, VOCAB)), SOAP)), "case note-base is of another"),
        (remade(BASE, ids=(5,) * 511), "case note-base is of another model"),
    ],
)
def test_logits_of_another_bundle_are_refused(
    folder: Path, manifest: Manifest, golden: Golden, expected: str
) -> None:
    text = refused(lambda: check_golden(golden, manifest, folder))
    assert text.startswith(f"{folder / PARITY_FILE}: does not fit the bundle: {expected}")
    assert text.endswith("; export again")


def test_a_bundle_that_was_not_run_needs_none(folder: Path, manifest: Manifest) -> None:
    spec = replace(manifest.medphi, verification=Verification("spec", {}))
    check_golden(Golden(()), replace(manifest, medphi=spec), folder)


def test_a_context_that_is_just_full_is_accepted(folder: Path, manifest: Manifest) -> None:
    # The last token is predicted and never read.
    check_golden(remade(BASE, ids=(5,) * 510), manifest, folder)
