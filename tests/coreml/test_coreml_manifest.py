"""metadata.json: every key is written, and nothing is read that does not say what it must."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import (
    MINI,
    TINY,
    make_bundle,
    make_facts,
    read_config,
    signatures,
)

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.bundle_facts import NO_DATE, source_date
from mlx_medphi.coreml.manifest import METADATA, AdapterEntry, Verification, json_text
from mlx_medphi.coreml.manifest_build import build_manifest
from mlx_medphi.coreml.manifest_checks import path_problem
from mlx_medphi.coreml.manifest_program import Stored
from mlx_medphi.coreml.manifest_read import MAX_BYTES, parse_manifest, read_manifest
from mlx_medphi.errors import BundleError, ExportError

Json = dict[str, Any]
# Maps whose keys are not the schema's: names, or what other modules put there.
FREE = (
    "language.function_map", "medphi.coreml.functions", "medphi.coreml.min_os",
    "medphi.quantization.exceptions", "medphi.generation.special_token_ids",
    "medphi.generation.defaults", "medphi.adapters.list.0.training",
    "medphi.adapters.list.0.functions", "medphi.cost", "medphi.verification.spec",
    "medphi.verification.graph", "medphi.export", "medphi.exporter",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("manifest") / "notes.medphi").path


@pytest.fixture(scope="module")
def written(folder: Path) -> Json:
    value: Json = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    return value


def read(value: Any) -> Any:
    return parse_manifest(value, "metadata.json")


def refused(value: Any) -> str:
    with pytest.raises(BundleError) as caught:
        read(value)
    return str(caught.value)


def changed(value: Json, change: Callable[[Json], object]) -> Json:
    other = copy.deepcopy(value)
    change(other)
    return other


def places(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, container, key) of everything whose form the schema says."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        inner = f"{path}.{key}".lstrip(".")
        if path not in FREE:
            yield inner, value, key
        if isinstance(item, (dict, list)) and inner not in FREE:
            yield from places(item, inner)


def named(path: str) -> str:
    """A place as messages write it."""
    return re.sub(r"\.(\d+)", r"[\1]", path)


def test_top_level_keys_are_those_of_apples_schema_and_ours(written: Json) -> None:
    assert set(written) == {
        "metadata_version", "kind", "name", "assets", "language", "source", "compression",
        "compilation", "medphi",
    }  # fmt: skip
    assert (written["metadata_version"], written["kind"]) == ("0.2", "llm")
    assert written["assets"] == {"main": "model/Phi3.mlpackage"}
    assert written["language"]["embedded_tokenizer"] is True
    assert written["language"]["function_map"] == {"prefill": ["prefill"], "decode": ["decode"]}
    assert isinstance(written["compression"], str)
    assert written["compilation"] == {"targets": [], "date": NO_DATE}


def test_our_keys_are_those_that_readers_rely_on(written: Json) -> None:
    ours = written["medphi"]
    assert set(ours) == {
        "schema", "coreml", "model", "quantization", "tokenizer", "generation", "adapters",
        "base_fingerprint", "memory", "cost", "verification", "export", "exporter", "files",
    }  # fmt: skip
    assert ours["schema"] == 1 and ours["coreml"]["mask_value"] == -10000
    assert set(ours["coreml"]["functions"]) == {"prefill", "decode"}
    assert set(ours["coreml"]["functions"]["decode"]) == {"inputs", "outputs", "states"}
    assert ours["coreml"]["functions"]["prefill"]["inputs"][0] == {
        "name": "inputIds", "shape": [1, 64], "dtype": "int32",
    }  # fmt: skip
    assert set(ours["adapters"]) == {"mode", "slot_kind", "rank_slot", "modules", "list"}
    assert ours["adapters"]["modules"] == ["qkv", "o", "gate_up", "down"]
    assert ours["generation"]["stop_token_ids"] == [305, 306, 312]
    assert ours["exporter"].keys() >= {"mlx_medphi", "coremltools", "mlx", "commit"}


def test_a_manifest_is_read_as_it_was_written(folder: Path, written: Json) -> None:
    manifest = read_manifest(folder)
    assert json.loads(json_text(manifest)) == written
    assert manifest.medphi.model.heads == 4 and manifest.medphi.files[0].path == "LICENSE"


def test_keys_that_are_not_known_are_left_alone(written: Json) -> None:
    def add(value: Json) -> None:
        value["user_data"] = {"x": 1}
        value["medphi"]["later"] = True
        value["medphi"]["coreml"]["functions"]["decode"]["inputs"][0]["unit"] = "ids"

    assert read(changed(written, add)) == read(written)


def test_every_missing_key_is_an_error_that_names_it(written: Json) -> None:
    value = copy.deepcopy(written)
    keys = [place for place in places(value) if isinstance(place[1], dict)]
    assert len(keys) > 100
    for path, holder, key in keys:
        kept = holder.pop(key)
        assert named(path) in refused(value), path
        holder[key] = kept
    read(value)


def test_every_value_of_another_kind_is_an_error_that_names_it(written: Json) -> None:
    value = copy.deepcopy(written)
    for path, holder, key in list(places(value)):
        kept = holder[key]
        # No value of the schema is a truth value but a few; those become numbers.
        holder[key] = 1 if isinstance(kept, bool) else False
        assert named(path) in refused(value), path
        holder[key] = kept
    read(value)


@pytest.mark.parametrize("number", [-1, 1.5, "1", 2**60, None])
def test_counts_are_whole_numbers_from_0_up(written: Json, number: object) -> None:
    def change(value: Json) -> None:
        value["medphi"]["model"]["heads"] = number

    assert "medphi.model.heads" in refused(changed(written, change))


def test_all_problems_are_told_at_once(written: Json) -> None:
    def change(value: Json) -> None:
        del value["name"]
        value["medphi"]["memory"]["kv"] = "much"

    text = refused(changed(written, change))
    assert "2 problems" in text and "name is missing" in text and "medphi.memory.kv" in text


def test_a_newer_schema_asks_for_an_update_whatever_else_it_changed(written: Json) -> None:
    newer = {"medphi": {"schema": 2, "coreml": None}}
    assert "made by a newer mlx_medphi (schema 2, this one reads 1): update the package" in (
        refused(newer)
    )
    for wrong in (0, -1, True, "1", None, 1.0):
        other = changed(written, lambda value, wrong=wrong: value["medphi"].update(schema=wrong))
        assert "medphi.schema" in refused(other)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/x",
        "a/../b",
        "a//b",
        "./a",
        ".",
        "..",
        "",
        "a/",
        "a\\b",
        "C:/x",
        "a\nb",
        "a\0b",
    ],
)
def test_paths_that_leave_the_bundle_are_refused(written: Json, path: str) -> None:
    assert path_problem(path) is not None

    def assets(value: Json) -> None:
        value["assets"]["main"] = path

    def tokenizer(value: Json) -> None:
        value["medphi"]["tokenizer"]["path"] = path

    def template(value: Json) -> None:
        value["medphi"]["tokenizer"]["chat_template"] = path

    def vectors(value: Json) -> None:
        value["medphi"]["tokenizer"]["vectors"] = path

    def folder(value: Json) -> None:
        value["language"]["tokenizer"] = path

    def adapter(value: Json) -> None:
        value["medphi"]["adapters"]["list"][0]["path"] = path

    def file(value: Json) -> None:
        value["medphi"]["files"][3]["path"] = path

    for change in (assets, tokenizer, template, vectors, folder, adapter, file):
        text = refused(changed(written, change))
        assert "no plain path" in text or "not for paths" in text, change.__name__


def test_ordinary_paths_are_accepted() -> None:
    for path in ("a", "model/Phi3.mlpackage/Data/com.apple.CoreML/x", "a b/c..d", "ä/漢.txt"):
        assert path_problem(path) is None


Change = Callable[[Json], object]
CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "a hash of the tokenizer": (
        lambda v: v["medphi"]["tokenizer"].update(sha256="0" * 64),
        "another SHA-256 of tokenizer/tokenizer.json",
    ),
    "a hash of the template": (
        lambda v: v["medphi"]["tokenizer"].update(chat_template_sha256="0" * 64),
        "another SHA-256 of tokenizer/chat_template.jinja",
    ),
    "a hash of an adapter": (
        lambda v: v["medphi"]["adapters"]["list"][0].update(sha256="0" * 64),
        "another SHA-256 of adapters/soap.safetensors",
    ),
    "an adapter without a hash": (
        lambda v: v["medphi"]["adapters"]["list"][0].update(sha256=None),
        "another SHA-256 of adapters/soap.safetensors",
    ),
    "vectors not listed": (
        lambda v: v["medphi"]["tokenizer"].update(vectors="tokenizer/other.json"),
        "lacks tokenizer/other.json",
    ),
    "a package not listed": (
        lambda v: v["assets"].update(main="model/Other.mlpackage"),
        "lists nothing of assets.main",
    ),
    "a hash that is none": (
        lambda v: v["medphi"]["files"][0].update(sha256="A" * 64),
        "LICENSE has no SHA-256",
    ),
    "a file twice": (
        lambda v: v["medphi"]["files"].append({**v["medphi"]["files"][0], "path": "license"}),
        "medphi.files holds 'license' twice",
    ),
    "an adapter twice": (
        lambda v: v["medphi"]["adapters"]["list"].append(
            {**v["medphi"]["adapters"]["list"][0], "name": "SOAP"}
        ),
        "medphi.adapters.list holds 'soap' twice",
    ),
    "an adapter named like a path": (
        lambda v: v["medphi"]["adapters"]["list"][0].update(name="a/b"),
        "is no name for an adapter",
    ),
    "no stop ids": (
        lambda v: v["medphi"]["generation"].update(stop_token_ids=[]),
        "stop_token_ids is empty",
    ),
    "blocks wider than the context": (
        lambda v: v["medphi"]["coreml"].update(context_length=32),
        "prefill_width",
    ),
    "blocks of nothing": (
        lambda v: v["medphi"]["coreml"].update(prefill_width=0),
        "prefill_width",
    ),
    "an empty shape": (
        lambda v: v["medphi"]["coreml"]["functions"]["decode"]["states"][0].update(shape=[2, 0]),
        "keyCache has an empty shape",
    ),
    "a default function that is not there": (
        lambda v: v["medphi"]["coreml"].update(default_function="main"),
        "lacks main",
    ),
    "a function map to nowhere": (
        lambda v: v["language"]["function_map"].update(decode=["decode", "decode_b"]),
        "lacks decode_b",
    ),
    "an adapter's function to nowhere": (
        lambda v: v["medphi"]["adapters"]["list"][0].update(functions={"decode": "decode_c"}),
        "lacks decode_c",
    ),
    "a level without its figures": (
        lambda v: v["medphi"]["verification"].update(level="predict"),
        "verification.predict has no figures",
    ),
    "a level without the one below": (
        lambda v: v["medphi"]["verification"].update(spec=None),
        "verification.spec has no figures",
    ),
    "slots without a rank": (
        lambda v: v["medphi"]["adapters"].update(rank_slot=None),
        "slot_kind and rank_slot",
    ),
    "a rank without slots": (
        lambda v: v["medphi"]["adapters"].update(mode="fused"),
        "slot_kind and rank_slot",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_said_twice_must_agree(written: Json, name: str) -> None:
    change, expected = CONTRADICTIONS[name]
    assert expected in refused(changed(written, change))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b'{"medphi": []}', b"\xff", b"{", b"[" * 200_000, b'{"medphi": NaN}'],
)
def test_damaged_files_are_errors_that_name_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / METADATA).write_bytes(data)
    with pytest.raises(BundleError, match=METADATA):
        read_manifest(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=METADATA):
        read_manifest(tmp_path)


def test_a_file_larger_than_any_manifest_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(BundleError, match="over"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(
    folder: Path, tmp_path: Path, number: str
) -> None:
    text = (folder / METADATA).read_text(encoding="utf-8")
    (tmp_path / METADATA).write_text(text.replace("1.25e-07", number), encoding="utf-8")
    with pytest.raises(BundleError, match="not JSON"):
        read_manifest(tmp_path)


def test_the_same_facts_give_the_same_text_in_any_order() -> None:
    entries = [AdapterEntry(name, None, None, 8, {}, {}) for name in ("b", "a")]
    one, two = (
        json_text(build_manifest(make_facts(adapters=order)))
        for order in (tuple(entries), tuple(reversed(entries)))
    )
    assert one == two
    # Sorted keys also where a map's own order is by chance.
    again = json.dumps(json.loads(one), sort_keys=True, indent=2, ensure_ascii=False)
    assert one == again + "\n"


def test_dates_are_those_of_source_date_epoch_or_none_at_all() -> None:
    assert source_date({}) == source_date({"SOURCE_DATE_EPOCH": ""}) == NO_DATE
    assert source_date({"SOURCE_DATE_EPOCH": "1700000000"}) == "2023-11-14T22:13:20Z"
    for wrong in ("yesterday", "1.5", "9" * 30):
        with pytest.raises(ExportError, match="SOURCE_DATE_EPOCH"):
            source_date({"SOURCE_DATE_EPOCH": wrong})


def test_facts_that_contradict_each_other_are_refused_before_anything_is_written() -> None:
    config = read_config(MINI)
    half = {"decode": signatures(config, 512)["decode"]}
    with pytest.raises(BundleError, match="lacks prefill"):
        build_manifest(make_facts(functions=half))
    with pytest.raises(BundleError, match="graph has no figures"):
        build_manifest(make_facts(verification=Verification("graph", spec={})))


@pytest.mark.parametrize(
    ("checkpoint", "context", "factors"),
    [
        ("mini-4k", 512, "none"),
        ("longrope-short", 4096, "short"),
        ("longrope-short", 4160, "both"),
    ],
)
def test_rope_factors_are_those_that_the_context_can_reach(
    checkpoint: str, context: int, factors: str
) -> None:
    config = read_config(MINI.parent / checkpoint)
    assert config.switch_length in (None, 4096)
    facts = make_facts(
        config=config, context=context, functions=signatures(config, context),
    )  # fmt: skip
    rope = build_manifest(facts).medphi.model.rope
    assert (rope.factors, rope.switch_length) == (factors, config.switch_length)
    assert rope.rotary_dim == config.rotary_dim


def test_rows_of_the_embedding_that_no_token_has_are_suppressed() -> None:
    assert build_manifest(make_facts()).medphi.generation.suppress_ranges == ((316, 319),)
    assert build_manifest(make_facts(TINY)).medphi.generation.suppress_ranges == ()


def test_functions_of_adapters_stand_beside_the_bases() -> None:
    functions = signatures(read_config(MINI), 512)
    functions |= {f"{name}_soap": functions[name] for name in ("decode", "prefill")}
    entry = AdapterEntry(
        "soap", None, None, 8, {"decode": "decode_soap", "prefill": "prefill_soap"}, {}
    )
    export = ExportConfig(adapters="functions")
    facts = make_facts(
        functions=functions, export=export, slot_rank=None, adapters=(entry,)
    )  # fmt: skip
    manifest = build_manifest(facts)
    assert manifest.language.function_map == {
        "prefill": ("prefill", "prefill_soap"),
        "decode": ("decode", "decode_soap"),
    }
    adapters = manifest.medphi.adapters
    assert (adapters.mode, adapters.slot_kind, adapters.rank_slot) == ("functions", None, None)


def test_without_slots_and_adapters_the_mode_is_none() -> None:
    export = ExportConfig(adapters="fused")
    assert build_manifest(make_facts(export=export, slot_rank=None)).medphi.adapters.mode == "none"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({}, "4-bit per-block g64, integer offset; embedding 8-bit g64; head 8-bit g64"),
        (
            {"scheme": "channel", "bits": 8, "group": None},
            "8-bit per-channel, integer offset; embedding 8-bit g64; head 8-bit g64",
        ),
        (
            {"bits": 16, "group": None, "embedding": Stored(16, None)},
            "float16; embedding float16; head 8-bit g64",
        ),
    ],
)
def test_compression_is_told_in_one_line(stored: Json, text: str) -> None:
    quantization = replace(make_facts().quantization, **stored)
    assert build_manifest(make_facts(quantization=quantization)).compression == text


def test_reading_a_bundle_loads_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys; from mlx_medphi.coreml.bundle import open_bundle; open_bundle(sys.argv[1]);"
        "print(*sorted({'mlx', 'coremltools', 'tokenizers', 'numpy'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=MINI.parents[3])
    assert done.stdout.strip() == ""
