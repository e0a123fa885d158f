"""Adapter names that every place accepts; packs that say everything and repeat byte for byte."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_medphi import __version__
from mlx_medphi.coreml.slot_file import PackFacts, check_names, make_pack, pack_path, write_pack
from mlx_medphi.coreml.slots import AdapterBase, slot_arrays, slot_shapes
from mlx_medphi.errors import AdapterError, UsageError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.adapter_formats import Adapter, Origin
from mlx_medphi.model.slot_pack import SlotPack
from mlx_medphi.model.slot_pack_read import read_pack
from mlx_medphi.model.weights import open_checkpoint

MINI = Path(__file__).resolve().parents[1] / "fixtures" / "phi3" / "mini-4k"
CONFIG = open_checkpoint(MINI).config
BASE = AdapterBase(CONFIG, "a" * 64)
FACTS = PackFacts("refdev/mini-4k", "b" * 64, "c" * 64)
TRAINED = Origin(
    "medphi/base", "d" * 64 + "-q4g64", {"bits": 4, "group_size": 64}, "0.1.0", {"iters": 3}
)


def lora() -> Adapter:
    return read_adapter(MINI / "peft_0")


def pack(adapter: Adapter | None = None, rank: int = 16) -> SlotPack:
    return make_pack("soap-notes", adapter or lora(), BASE, rank, FACTS)


# --- names


@pytest.mark.parametrize("names", [["a"], ["Soap-Notes_2", "soap"], ["x" * 64], []])
def test_ordinary_names_are_accepted(names: list[str]) -> None:
    check_names(names)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["1st"], "'1st' is no adapter name"),
        ([""], "'' is no adapter name"),
        (["-a"], "'-a' is no adapter name"),
        (["a b"], "'a b' is no adapter name"),
        (["../a"], "is no adapter name"),
        (["naïve"], "'naïve' is no adapter name"),
        (["notes\n"], "is no adapter name"),
        (["x" * 65], "is no adapter name"),
        (["decode"], "'decode' is taken by the model"),
        (["Prefill"], "'Prefill' is taken by the model"),
        (["base", "main"], "'base' is taken by the model itself; 'main' is taken"),
        (["soap", "soap"], "'soap' comes twice"),
        (["soap", "SOAP"], "'SOAP' is the same as 'soap'"),
        (["soap-a", "soap_a"], "'soap_a' is the same as 'soap-a'"),
        (["a b", "x", "X"], "'a b' is no adapter name; 'X' is the same as 'x'"),
    ],
)
def test_impossible_and_colliding_names_are_refused(names: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_names(names)


def test_a_pack_needs_a_possible_name() -> None:
    with pytest.raises(UsageError, match="'base' is taken"):
        make_pack("base", lora(), BASE, 16, FACTS)


# --- packs


def test_the_file_holds_the_slot_arrays(tmp_path: Path) -> None:
    path = pack_path(tmp_path, "soap-notes")
    write_pack(path, pack())
    assert path == tmp_path / "soap-notes.safetensors"
    expected = slot_arrays(lora(), CONFIG, 16)
    stored = load_file(str(path))  # the format's own reader
    assert list(read_safetensors_header(path).tensors) == sorted(slot_shapes(CONFIG, 16))
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert stored[name].dtype == np.float16
        np.testing.assert_array_equal(stored[name], array)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = lora()
    other = replace(adapter, layers=dict(reversed(adapter.layers.items())))
    write_pack(tmp_path / "a.safetensors", pack(adapter))
    write_pack(tmp_path / "b.safetensors", pack(other))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_metadata_says_what_a_swift_app_asks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_pack(path, pack(replace(read_adapter(MINI / "peft_1"), origin=TRAINED)))
    header = read_safetensors_header(path)
    data = path.read_bytes()[header.data_start :]
    assert header.metadata == {
        "format": "medphi-slots-1",
        "name": "soap-notes",
        "base_id": "refdev/mini-4k",
        "base_fingerprint": "d" * 64 + "-q4g64",
        "base_fingerprint_stated": "true",
        "base_quantization": '{"bits": 4, "group_size": 64}',
        "rank": "4",
        "rank_slot": "16",
        "modules": '["qkv", "o"]',
        "layers": "[0, 1]",
        "dtype": "F16",
        "scale_folded": "true",
        "source_format": "PEFT directory",
        "tokenizer_sha256": "b" * 64,
        "chat_template_sha256": "c" * 64,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "dropout": json.dumps(0.0),
        "training": '{"iters": 3}',
        "package_version": __version__,
    }
    assert list(header.metadata) == sorted(header.metadata)


def test_an_adapter_that_names_no_base_gets_the_one_it_is_exported_for(tmp_path: Path) -> None:
    write_pack(tmp_path / "a.safetensors", pack())
    found = read_pack(tmp_path / "a.safetensors")
    assert (found.base_fingerprint, found.base_fingerprint_stated) == ("a" * 64, False)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = pack(replace(lora(), origin=TRAINED))
    write_pack(tmp_path / "a.safetensors", written)
    found = read_pack(tmp_path / "a.safetensors")
    assert replace(found, arrays={}) == replace(written, arrays={})
    for name, array in written.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_an_adapter_of_zeros_is_refused() -> None:
    adapter = lora()
    nothing = {
        name: replace(change, a=mx.zeros_like(change.a), b=mx.zeros_like(change.b))
        for name, change in adapter.layers.items()
    }
    with pytest.raises(AdapterError, match="soap-notes: is all zeros.*leave it out"):
        pack(replace(adapter, layers=nothing))


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(AdapterError, match="exists already; choose another name"):
        write_pack(path, pack())
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"file/a\.safetensors: cannot be written \("):
        write_pack(tmp_path / "file" / "a.safetensors", pack())
