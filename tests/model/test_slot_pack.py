"""A slot pack is an adapter like any other here, and a damaged one is refused whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from adapter_cases import MINI, SAME, adapted, base, ids, logits
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_medphi.coreml.slot_file import PackFacts, make_pack, write_pack
from mlx_medphi.coreml.slots import AdapterBase
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter import (
    adapter_info,
    adapter_of,
    convert_adapter,
    load_adapter,
    save_adapter,
)
from mlx_medphi.model.adapter_files import read_adapter, recorded_base
from mlx_medphi.model.adapter_formats import Adapter
from mlx_medphi.model.fingerprint import fingerprint
from mlx_medphi.model.slot_pack_read import read_pack

# Each factor is rounded to float16 (2^-11); of the change in the logits, which passes two blocks
# with four changes each, that makes 0.2 % at most on these.
HALF_ROUNDING = 3e-3
THEIRS = MINI.parents[1] / "peft_theirs"

Arrays = dict[str, npt.NDArray[Any]]


def packed(adapter: Adapter, path: Path, rank: int = 16) -> Path:
    to = AdapterBase(base().config, fingerprint(MINI))
    facts = PackFacts("refdev/mini-4k", "b" * 64, "c" * 64)
    write_pack(path, make_pack("notes", adapter, to, rank, facts))
    return path


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack of PEFT's adapter of rank 8 in slots of rank 16."""
    return packed(read_adapter(MINI / "peft_0"), tmp_path / "notes.safetensors")


@pytest.mark.parametrize(
    "folder", [MINI / "peft_0", MINI / "peft_1", THEIRS / "unfused", THEIRS / "patterns"],
    ids=lambda folder: folder.name,
)  # fmt: skip
def test_a_pack_gives_the_logits_of_the_adapter_it_was_made_from(
    folder: Path, tmp_path: Path
) -> None:
    original, model = base(), base()
    load_adapter(original, folder)
    info = load_adapter(model, packed(read_adapter(folder), tmp_path / "a.safetensors", 32))
    expected = logits(original)
    change = np.abs(expected - logits(base())).max()
    assert change > 0.5
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=HALF_ROUNDING * change)
    assert (info.form, info.scale) == ("slot pack", 1.0)
    assert info.rank == read_adapter(folder).scaling.rank


@pytest.mark.parametrize("folder", [MINI / "peft_0", MINI / "peft_1"], ids=["lora", "rslora"])
def test_folding_the_scale_into_b_costs_nothing_beside_float16(
    folder: Path, tmp_path: Path
) -> None:
    # Their scales are powers of two, so what is left is the rounding that a float16 file has too.
    convert_adapter(folder, tmp_path / "own.safetensors", dtype="float16")
    half, model = base(), base()
    load_adapter(half, tmp_path / "own.safetensors")
    load_adapter(model, packed(read_adapter(folder), tmp_path / "a.safetensors"))
    np.testing.assert_allclose(logits(model), logits(half), rtol=0, atol=SAME)


def test_a_pack_says_where_it_comes_from(pack: Path) -> None:
    info = adapter_info(pack)
    assert info.form == "slot pack"
    assert (info.rank, info.scale, info.layers) == (8, 1.0, (0, 1))
    assert info.base_name == "refdev/mini-4k"
    assert info.base_fingerprint == recorded_base(pack) == fingerprint(MINI)
    assert info.tensors == 16 and info.dtypes == ("float16",)
    assert info.bytes == pack.stat().st_size


def test_a_pack_of_our_own_adapter_keeps_its_base_layers_and_training(tmp_path: Path) -> None:
    model = adapted(num_layers=1, keys=("self_attn.o_proj", "mlp.down_proj"), rank=3)
    save_adapter(model, tmp_path / "own.safetensors", training={"iters": 7})
    path = packed(read_adapter(tmp_path / "own.safetensors"), tmp_path / "notes.safetensors", 8)
    info = adapter_info(path)
    assert (info.rank, info.layers) == (3, (1,))
    assert info.keys == ("self_attn.o_proj", "mlp.down_proj")
    assert info.training == {"iters": 7}
    assert info.base_fingerprint == model.fingerprint
    loaded = base()
    load_adapter(loaded, path)
    change = np.abs(logits(model) - logits(base())).max()
    assert change > 0.1
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=HALF_ROUNDING * change)


def test_a_pack_of_a_quantised_base_fits_that_base_alone(tmp_path: Path) -> None:
    model = adapted(how={"quantize": (4, 32)}, num_layers=1)
    save_adapter(model, tmp_path / "own.safetensors")
    adapter = read_adapter(tmp_path / "own.safetensors")
    quantised = AdapterBase(base().config, fingerprint(MINI), (4, 32))
    facts = PackFacts("refdev/mini-4k", "b" * 64, "c" * 64)
    path = tmp_path / "notes.safetensors"
    write_pack(path, make_pack("notes", adapter, quantised, 8, facts))
    info = load_adapter(base(quantize=(4, 32)), path)
    assert info.base_quantization == model.config.quantization.to_mlx()
    with pytest.raises(AdapterError, match="base quantisation: 4 bits in groups of 32"):
        load_adapter(base(), path)


def test_a_pack_knows_the_blocks_behind_its_last_change(tmp_path: Path) -> None:
    adapter = read_adapter(MINI / "peft_0")
    first = {name: c for name, c in adapter.layers.items() if ".layers.0." in name}
    path = packed(replace(adapter, layers=first), tmp_path / "a.safetensors")
    assert (adapter_info(path).layers, adapter_info(path).num_layers) == ((0,), 2)


def test_a_pack_of_another_base_is_refused(pack: Path) -> None:
    with pytest.raises(AdapterError, match="base fingerprint"):
        load_adapter(base(quantize=(4, 32)), pack)


def test_a_pack_becomes_a_training_file_with_the_same_numbers(pack: Path, tmp_path: Path) -> None:
    convert_adapter(pack, tmp_path / "own.safetensors")
    converted, model = base(), base()
    load_adapter(converted, tmp_path / "own.safetensors")
    load_adapter(model, pack)
    np.testing.assert_array_equal(logits(converted), logits(model))


def test_a_fresh_adapter_survives_as_one_that_changes_nothing(tmp_path: Path) -> None:
    adapter = adapter_of(adapted(size=0.0))
    assert adapter is not None
    model = base()
    load_adapter(model, packed(adapter, tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(logits(model, ids()), logits(base(), ids()))


# --- damage


def rewrite(path: Path, change: Callable[[Arrays, dict[str, str]], None]) -> None:
    with safe_open(str(path), "np") as file:
        arrays = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(arrays, metadata)
    save_file(arrays, str(path), metadata)


def drop(name: str) -> Callable[[Arrays, dict[str, str]], None]:
    return lambda arrays, metadata: (arrays if name in arrays else metadata).pop(name)


def says(name: str, value: str) -> Callable[[Arrays, dict[str, str]], None]:
    return lambda arrays, metadata: metadata.update({name: value})


def cut(name: str, shape: tuple[int, ...], dtype: Any = np.float16) -> Callable[..., None]:
    return lambda arrays, metadata: arrays.update({name: np.ones(shape, dtype)})


def put(name: str, at: tuple[int, ...], value: float) -> Callable[..., None]:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        arrays[name][at] = value

    return change


def without_values(arrays: Arrays, metadata: dict[str, str]) -> None:
    for array in arrays.values():
        array[:] = 0


def too_many_layers(arrays: Arrays, metadata: dict[str, str]) -> None:
    arrays.update({name: np.zeros((10_001, 1, 1), np.float16) for name in arrays})


DAMAGE: dict[str, tuple[Callable[..., Any], str]] = {
    "slot missing": (drop("loraB_o"), "loraB_o: missing"),
    "slot unknown": (cut("loraC_o", (2, 16, 64)), "loraC_o: is no slot"),
    "float32": (cut("loraA_o", (2, 16, 64), np.float32), "loraA_o: F32 of shape"),
    "two extents": (cut("loraA_o", (16, 64)), r"loraA_o: F16 of shape \(16, 64\)"),
    "no layers": (cut("loraA_o", (0, 16, 64)), r"loraA_o: F16 of shape \(0, 16, 64\)"),
    "other layers": (cut("loraA_o", (3, 16, 64)), r"loraA_o: shape \(3, 16, 64\), the other"),
    "other rank": (cut("loraB_o", (2, 64, 8)), r"loraB_o: shape .* ask for \(2, 64, 16\)"),
    "other width": (cut("loraA_gate_up", (2, 16, 65)), r"loraA_gate_up: shape"),
    "other outputs": (cut("loraB_down", (2, 65, 16)), r"loraB_down: shape"),
    "layers of no model": (too_many_layers, "10001 layers, no Phi-3 has more than 10000"),
    "infinite": (put("loraA_o", (0, 0, 0), np.inf), "loraA_o: holds values that are not finite"),
    "not a number": (put("loraB_o", (0, 0, 0), np.nan), "loraB_o: holds values that are not"),
    "above A's rank": (put("loraA_o", (1, 8, 0), 1), "o: values above its rank of 8"),
    "above B's rank": (put("loraB_o", (1, 0, 15), 1), "o: values above its rank of 8"),
    "a value": (put("loraA_o", (0, 0, 0), 1), "its values are not those it was written with"),
    "zeros": (without_values, "holds only zeros"),
    "rank": (says("rank", "17"), "rank is 17, its slots have 16"),
    "lower rank": (says("rank", "7"), "qkv: values above its rank of 7"),
    "rank zero": (says("rank", "0"), "rank is 0, expected a positive whole number"),
    "rank text": (says("rank", "eight"), "its metadata is malformed"),
    "rank_slot": (says("rank_slot", "8"), "rank_slot: its metadata says 8, its tensors 16"),
    "modules": (says("modules", '["qkv"]'), r"modules: its metadata says \[\"qkv\"\], its tens"),
    "layers": (says("layers", "[0]"), r"layers: its metadata says \[0\], its tensors \[0, 1\]"),
    "not folded": (says("scale_folded", "false"), "scale_folded: 'false' is not possible"),
    "dtype": (says("dtype", "BF16"), "dtype: 'BF16' is not possible"),
    "source": (says("source_format", "cake"), "source_format: 'cake' is not possible"),
    "fingerprint": (says("base_fingerprint", "x"), "base_fingerprint: 'x' is not possible"),
    "stated": (says("base_fingerprint_stated", "1"), "base_fingerprint_stated: '1' is not"),
    "hash": (says("tokenizer_sha256", "B" * 64), "tokenizer_sha256: 'BBBB"),
    "template": (says("chat_template_sha256", ""), "chat_template_sha256: '' is not possible"),
    "training": (says("training", "[]"), r"training: '\[\]' is not possible"),
    "quantisation": (says("base_quantization", "4"), "base_quantization: '4' is not possible"),
    "dropout": (says("dropout", "NaN"), "dropout is nan, expected a number"),
    "deep": (says("training", "[" * 100_000), "its metadata is malformed"),
    "name": (drop("name"), "name: missing in the metadata"),
    "newer": (says("format", "medphi-slots-2"), "'medphi-slots-2'.*install a newer mlx_medphi"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_pack_is_refused_with_what_is_wrong(case: str, pack: Path) -> None:
    change, reason = DAMAGE[case]
    rewrite(pack, change)
    with pytest.raises(AdapterError, match=reason) as caught:
        adapter_info(pack)
    assert str(caught.value).startswith(str(pack))


def test_everything_wrong_is_in_one_message(pack: Path) -> None:
    def change(arrays: Arrays, metadata: dict[str, str]) -> None:
        metadata.update(dtype="BF16", dropout="2", training="3")

    rewrite(pack, change)
    with pytest.raises(AdapterError, match="3 differences"):
        read_pack(pack)


def test_a_pack_cut_short_is_refused(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes()[:-2])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        adapter_info(pack)


def test_a_training_file_is_no_pack(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "own.safetensors")
    with pytest.raises(AdapterError, match="no slot pack that this library knows.*'medphi-adap"):
        read_pack(tmp_path / "own.safetensors")


def test_a_pack_is_not_overwritten_by_a_saved_adapter(pack: Path) -> None:
    before = pack.read_bytes()
    with pytest.raises(AdapterError, match="is no adapter file of this library"):
        save_adapter(adapted(), pack)
    assert pack.read_bytes() == before


def test_a_pack_that_nobody_knows_the_base_of_is_read(pack: Path) -> None:
    rewrite(pack, drop("base_fingerprint"))
    assert read_pack(pack).base_fingerprint is None
    assert adapter_info(pack).base_fingerprint is None
    assert replace(read_pack(pack), arrays={}).name == "notes"
    assert json.loads(json.dumps(dict(read_pack(pack).training))) == {}
