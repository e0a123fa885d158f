"""A bundle: written in order, the same bytes each time, and opened only as it was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import (
    GRAPH,
    MINI,
    TINY,
    add_adapter,
    fill_package,
    make_bundle,
    make_facts,
    rewrite,
)

from mlx_medphi.coreml.bundle import Bundle, open_bundle
from mlx_medphi.coreml.bundle_write import (
    draft_bundle,
    finish_bundle,
    record_verification,
    seal_bundle,
    write_companions,
)
from mlx_medphi.coreml.manifest import METADATA, PARITY, SUMS, Verification
from mlx_medphi.coreml.sums import bundle_files, read_sums, write_sums
from mlx_medphi.coreml.vectors import check_vectors
from mlx_medphi.errors import BundleError
from mlx_medphi.text.tokenizer import Tokenizer

WEIGHTS = "model/Phi3.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "notes.medphi")


@pytest.fixture
def bundle(whole: Bundle, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "notes.medphi"))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(path, **options)
    return str(caught.value)


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_bundle_holds_every_file_and_opens(whole: Bundle) -> None:
    assert set(contents(whole.path)) == {
        "metadata.json", "generation_config.json", "parity.json", "SHA256SUMS", "README.md",
        "LICENSE", "NOTICE", "adapters/soap.safetensors", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "tokenizer/generation_config.json",
        "tokenizer/chat_template.jinja", "tokenizer/vectors.json", WEIGHTS,
        "model/Phi3.mlpackage/Manifest.json",
        "model/Phi3.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    }  # fmt: skip
    opened = open_bundle(whole.path)
    assert opened == whole
    assert opened.package.name == "Phi3.mlpackage" and opened.package.is_dir()
    assert opened.parity.is_file() and opened.vectors.is_file()
    assert opened.adapters == {"soap": whole.path / "adapters" / "soap.safetensors"}
    assert opened.level == "graph"


def test_the_size_is_that_of_all_files(whole: Bundle) -> None:
    assert whole.nbytes == sum(map(len, contents(whole.path).values()))
    assert whole.size == f"{whole.nbytes / 1e3:.1f} kB"


def test_files_lists_all_but_the_two_that_come_after(whole: Bundle) -> None:
    described = {entry.path: entry for entry in whole.manifest.medphi.files}
    actual = contents(whole.path)
    assert described.keys() == actual.keys() - {METADATA, SUMS}
    for path, entry in described.items():
        assert entry.bytes == len(actual[path])
        assert entry.sha256 == hashlib.sha256(actual[path]).hexdigest()


def test_sums_have_the_form_of_sha256sum_and_cover_the_manifest(whole: Bundle) -> None:
    text = (whole.path / SUMS).read_text(encoding="utf-8")
    assert re.fullmatch(r"([0-9a-f]{64}  [^\n]+\n)+", text)
    lines = [line.split("  ", 1) for line in text.splitlines()]
    actual = contents(whole.path)
    assert [path for _, path in lines] == sorted(actual.keys() - {SUMS})
    assert all(hashlib.sha256(actual[path]).hexdigest() == sha256 for sha256, path in lines)


def test_a_flipped_byte_in_any_file_is_named(bundle: Path) -> None:
    for path, data in contents(bundle).items():
        for at in (0, len(data) // 2, len(data) - 1):
            flipped = bytearray(data)
            flipped[at] ^= 1
            (bundle / path).write_bytes(flipped)
            assert path in refused(bundle), (path, at)
        (bundle / path).write_bytes(data)
    open_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    for path, data in contents(bundle).items():
        (bundle / path).unlink()
        assert path in refused(bundle)
        (bundle / path).write_bytes(data)


def test_a_file_that_nobody_listed_is_named(bundle: Path) -> None:
    (bundle / "model" / "extra.bin").write_bytes(b"x")
    assert "1 file not as SHA256SUMS says: model/extra.bin is not listed" in refused(bundle)


def test_every_difference_is_told_in_one_message(bundle: Path) -> None:
    (bundle / "LICENSE").unlink()
    (bundle / "NOTICE").write_text("other")
    (bundle / "more").write_text("x")
    (bundle / METADATA).write_text("{}")
    text = refused(bundle)
    assert "4 files" in text
    for line in ("LICENSE is missing", "NOTICE is altered", "more is not listed"):
        assert line in text
    assert f"{METADATA} is altered" in text


def test_a_long_list_is_capped_at_ten(bundle: Path) -> None:
    for number in range(14):
        (bundle / f"extra{number:02d}").write_text("x")
    text = refused(bundle)
    assert "14 files" in text and "extra09" in text and "extra10" not in text
    assert "… and 4 more" in text


def test_what_finder_leaves_in_every_folder_does_no_harm(bundle: Path) -> None:
    (bundle / "model" / ".DS_Store").write_bytes(b"x")
    open_bundle(bundle)


def make_link(place: Path) -> None:
    place.symlink_to(place.parent.parent / METADATA)


def make_broken_link(place: Path) -> None:
    place.symlink_to("nowhere")


def make_folder_link(place: Path) -> None:
    place.symlink_to(place.parent.parent, target_is_directory=True)


def make_pipe(place: Path) -> None:
    os.mkfifo(place)


@pytest.mark.parametrize("make", [make_link, make_broken_link, make_folder_link, make_pipe])
def test_links_and_devices_inside_are_refused(bundle: Path, make: Callable[[Path], None]) -> None:
    make(bundle / "model" / "odd")
    assert "no plain file (model/odd)" in refused(bundle)
    with pytest.raises(BundleError, match="model/odd"):
        write_sums(bundle)


def test_a_listed_file_replaced_by_a_link_to_equal_bytes_is_refused(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.move(bundle / WEIGHTS, tmp_path / "weight.bin")
    (bundle / WEIGHTS).symlink_to(tmp_path / "weight.bin")
    assert WEIGHTS in refused(bundle)


def test_a_bundle_may_itself_be_reached_by_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle, target_is_directory=True)
    assert open_bundle(tmp_path / "link").level == "graph"


def test_names_that_cannot_be_listed_are_refused(bundle: Path) -> None:
    (bundle / "a\nb").write_text("x")
    assert "no plain file" in refused(bundle)


def test_new_sums_do_not_hide_a_file_from_the_manifest(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"other weights")
    write_sums(bundle)
    assert f"disagree about {WEIGHTS}" in refused(bundle)


def test_a_manifest_that_lies_about_paths_is_refused_though_its_hash_fits(bundle: Path) -> None:
    outside = "../secret.safetensors"
    rewrite(bundle, lambda value: value["medphi"]["adapters"]["list"][0].update(path=outside))
    assert "medphi.adapters.list.soap" in refused(bundle)


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  ../x", "0" * 64 + "  /etc/x", "0" * 64 + " x", "x  y", "", "METADATA"]
)
def test_damaged_sums_are_refused(bundle: Path, line: str) -> None:
    text = (bundle / SUMS).read_text()
    twice = next(row for row in text.splitlines() if row.endswith(METADATA))
    (bundle / SUMS).write_text(text + line.replace("METADATA", twice) + "\n")
    assert f"{SUMS}: line" in refused(bundle)


def test_sums_cut_short_are_refused(bundle: Path) -> None:
    data = (bundle / SUMS).read_bytes()
    for cut in (b"\xff\n", b"0", data[:-1], data[:-9]):
        (bundle / SUMS).write_bytes(cut)
        text = refused(bundle)
        assert SUMS in text and "damaged" in text
    for cut in (b"", data[: data.rindex(b"\n", 0, -1) + 1]):
        (bundle / SUMS).write_bytes(cut)
        assert re.search("is not listed|disagree about", refused(bundle))
    (bundle / SUMS).write_bytes(data.replace(data.splitlines(True)[5], b""))
    assert f"{METADATA} is not listed" in refused(bundle)


def test_a_newer_schema_is_told_before_gigabytes_are_read(bundle: Path) -> None:
    rewrite(bundle, lambda value: value["medphi"].update(schema=2))
    calls: list[tuple[int, int]] = []
    text = refused(bundle, progress=lambda done, total: calls.append((done, total)))
    assert "made by a newer mlx_medphi (schema 2, this one reads 1): update the package" in text
    assert not calls


def test_progress_counts_every_byte_that_is_read(whole: Bundle) -> None:
    calls: list[tuple[int, int]] = []
    open_bundle(whole.path, progress=lambda done, total: calls.append((done, total)))
    total = whole.nbytes - (whole.path / SUMS).stat().st_size
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_without_check_only_the_manifest_is_read(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"other")
    assert open_bundle(bundle, check=False).level == "graph"
    (bundle / METADATA).write_text("{}")
    assert "medphi" in refused(bundle, check=False)


def test_what_is_no_bundle_is_told_apart(bundle: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.medphi")
    assert "is a file" in refused(bundle / METADATA)
    assert f"the bundle is {bundle}" in refused(bundle / "model" / "Phi3.mlpackage")
    (tmp_path / "empty").mkdir()
    assert "not a bundle" in refused(tmp_path / "empty")


def test_the_same_facts_give_the_same_bytes(tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "one" / "a.medphi", TINY)
    two = make_bundle(tmp_path / "two" / "b.medphi", TINY)
    assert contents(one.path) == contents(two.path)
    seal_bundle(two.path, make_facts(TINY, adapters=one.manifest.medphi.adapters.list))
    assert contents(one.path) == contents(two.path)


def test_the_date_changes_the_manifest_alone(whole: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "notes.medphi", date="2023-11-14T22:13:20Z")
    pairs = zip(contents(whole.path).items(), contents(other.path).items(), strict=True)
    assert {one[0] for one, two in pairs if one != two} == {METADATA, SUMS}


def test_a_draft_says_what_the_bundle_will_say_and_writes_nothing(
    whole: Bundle, tmp_path: Path
) -> None:
    fill_package(tmp_path / "notes.medphi")
    facts = make_facts(adapters=whole.manifest.medphi.adapters.list)
    before = contents(tmp_path)
    draft = draft_bundle(tmp_path / "notes.medphi", facts)
    assert contents(tmp_path) == before
    ours = replace(whole.manifest.medphi, files=())
    assert draft.manifest == replace(whole.manifest, medphi=ours)
    assert draft.package.is_dir()


def test_the_tokenizer_of_a_bundle_is_the_bases_own(whole: Bundle) -> None:
    base, copied = Tokenizer.load(MINI), Tokenizer.load(whole.tokenizer_directory)
    for name, source in base.files.items():
        assert (whole.tokenizer_directory / name).read_bytes() == source.read_bytes()
    assert copied.stop_ids == base.stop_ids and copied.template == base.template
    assert check_vectors(copied, whole.vectors) > 300


def test_the_template_is_a_file_of_its_own_and_hashed_as_such(whole: Bundle) -> None:
    config = json.loads((MINI / "tokenizer_config.json").read_text(encoding="utf-8"))
    data = (whole.tokenizer_directory / "chat_template.jinja").read_bytes()
    assert data.decode("utf-8") == config["chat_template"]
    tokenizer = whole.manifest.medphi.tokenizer
    assert tokenizer.chat_template_sha256 == hashlib.sha256(data).hexdigest()
    assert tokenizer.chat_format.after_role == "\n" and tokenizer.chat_format.knows_system


def test_a_template_file_of_the_base_is_copied_byte_for_byte(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(MINI, tmp_path / "base"))
    config = json.loads((MINI / "tokenizer_config.json").read_text(encoding="utf-8"))
    data = config.pop("chat_template").encode("utf-8") + b"\r\n"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_bytes(data)
    made = make_bundle(tmp_path / "notes.medphi", checkpoint)
    assert (made.tokenizer_directory / "chat_template.jinja").read_bytes() == data
    open_bundle(made.path)


def test_generation_config_names_every_stop_id_where_the_base_does_not(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(MINI, tmp_path / "base"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 305}')
    made = make_bundle(tmp_path / "notes.medphi", checkpoint)
    written = json.loads((made.path / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [305, 312], "pad_token_id": 305}
    assert made.manifest.medphi.generation.stop_token_ids == (305, 312)


def test_an_entry_that_is_not_the_file_is_refused_before_the_manifest_is_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "notes.medphi"
    fill_package(folder)
    entry = replace(add_adapter(folder), sha256="0" * 64)
    with pytest.raises(BundleError, match="another SHA-256 of adapters/soap"):
        finish_bundle(folder, make_facts(adapters=(entry,)))
    assert not (folder / METADATA).exists()


def test_companions_need_no_package_yet(tmp_path: Path) -> None:
    write_companions(tmp_path, make_facts())
    assert set(bundle_files(tmp_path)) >= {"tokenizer/vectors.json", "LICENSE", "NOTICE"}


PREDICT = replace(GRAPH, level="predict", predict={"device": "Mac16,1", "max_abs": 0.01})


def test_a_further_verification_is_recorded_and_the_rest_stays(bundle: Path) -> None:
    before = contents(bundle)
    recorded = record_verification(open_bundle(bundle), PREDICT, {"schema": 1, "level": "predict"})
    assert recorded == open_bundle(bundle) and recorded.level == "predict"
    after = contents(bundle)
    assert {path for path in after if after[path] != before.get(path)} == {
        METADATA, SUMS, "README.md", PARITY,
    }  # fmt: skip
    assert after.keys() == before.keys()
    assert json.loads(after[PARITY]) == {"schema": 1, "level": "predict"}
    assert b"has not run on Apple" not in after["README.md"]
    assert not list(bundle.parent.glob(".*"))


def test_the_certificate_may_stay_as_it_is(bundle: Path) -> None:
    before = (bundle / PARITY).read_bytes()
    record_verification(open_bundle(bundle), PREDICT)
    assert (bundle / PARITY).read_bytes() == before
    assert open_bundle(bundle).level == "predict"


def test_a_level_without_figures_is_refused_and_the_bundle_stays(bundle: Path) -> None:
    before = contents(bundle)
    with pytest.raises(BundleError, match="predict has no figures"):
        record_verification(open_bundle(bundle), Verification("predict", {}, {}))
    assert contents(bundle) == before
    assert not list(bundle.parent.glob(".*"))


def test_recording_copies_where_the_disk_has_no_hard_links(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    record_verification(open_bundle(bundle), PREDICT)
    assert open_bundle(bundle).level == "predict"


def test_sums_read_back_are_the_sums_written(bundle: Path) -> None:
    before = (bundle / SUMS).read_bytes()
    write_sums(bundle)
    assert (bundle / SUMS).read_bytes() == before
    paths = sorted(contents(bundle).keys() - {SUMS})
    assert list(read_sums(bundle)) == list(bundle_files(bundle)) == paths


def test_a_notebook_shows_the_facts_as_a_table(whole: Bundle) -> None:
    html = whole._repr_html_()
    assert html.startswith("<table>") and "owner/base" in html and whole.size in html
    assert "It has not run on Apple hardware" in html and "slots of rank 16" in html
    shown: Iterator[tuple[str, str]] = whole.__rich_repr__()
    assert dict(shown)["context"] == "512 tokens"
    assert repr(whole) == (
        f"Bundle(notes.medphi, {whole.size}, context 512, 1 adapter in slots of rank 16, "
        "verified: graph)"
    )


def test_what_a_notebook_shows_is_escaped(bundle: Path) -> None:
    rewrite(bundle, lambda value: value["source"].update(model_id="<script>x</script>"))
    assert "<script>" not in open_bundle(bundle)._repr_html_()
