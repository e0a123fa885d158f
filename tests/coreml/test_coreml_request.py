"""What cannot be exported is refused before anything is written, in one line that says the way."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from export_cases import MINI, make_adapter, one_block, quantised_base, settings

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.manifest import METADATA, SUMS
from mlx_medphi.coreml.request import Request, check_place, check_space, make_request
from mlx_medphi.coreml.sums import write_sums
from mlx_medphi.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ExportError,
    MedPhiError,
    UsageError,
)
from mlx_medphi.model.fingerprint import fingerprint
from mlx_medphi.model.weights import open_checkpoint

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of mini-4k and one of another base."""
    folder = tmp_path_factory.mktemp("adapters")
    other = one_block(folder / "other")
    return {
        "lora": make_adapter(folder / "lora.safetensors"),
        "wide": make_adapter(folder / "wide.safetensors", rank=9),
        "dora": make_adapter(folder / "dora.safetensors", fine_tune_type="dora"),
        "on_load": make_adapter(folder / "on_load.safetensors", quantize=(4, 32)),
        "foreign": make_adapter(folder / "foreign.safetensors", other),
    }


@pytest.fixture(scope="module")
def base8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_base(tmp_path_factory.mktemp("base") / "mini-8bit", 8)


def request_of(given: Any = (), base: Path = MINI, **changes: Any) -> Request:
    return make_request(base, given, settings(**changes))


def refusal(kind: type[MedPhiError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_request_has_all_its_settings() -> None:
    made = make_request(MINI, (), ExportConfig(group_size=32))
    assert (made.bits, made.context, made.rank) == (4, 2048, 16)
    assert made.base.name == "mini-4k"
    assert made.base.fingerprint == fingerprint(open_checkpoint(MINI))
    assert made.quantizes and made.on_load == (4, 32)
    assert made.adapters == {}
    assert made.notes == (
        "a plain base gets 4 bits unless --bits (bits) says otherwise; 16 keeps it",
    )
    assert request_of(bits=4).notes == ()


def test_a_short_model_gets_all_its_context_in_whole_blocks(tmp_path: Path) -> None:
    base = shutil.copytree(MINI, tmp_path / "base")
    config = base / "config.json"
    config.write_text(config.read_text().replace("4096", "200"))
    assert make_request(base, (), ExportConfig(bits=16)).context == 192
    config.write_text(config.read_text().replace("200", "63"))
    text = refusal(ExportError, lambda: make_request(base, (), ExportConfig(bits=16)))
    assert text == "the model has 63 positions; a package needs 64 or more"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context": 100}, "context is 100, expected a multiple of 64"),
        ({"context": 32}, "context is 32, expected between 64 and 131072"),
        ({"bits": 5}, "bits is 5, expected one of 4, 8, 16 or null"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": 4.0}, "bits is 4.0, expected one of 4, 8, 16 or null"),
        ({"group_size": 48}, "group_size is 48, expected one of 32, 64, 128"),
        ({"embedding_bits": 4}, "embedding_bits is 4, expected one of 8, 16"),
        ({"prefill": 1}, "prefill is 1, expected between 2 and 512"),
        ({"prefill": 128}, "prefill is 128, more than the context of 64 tokens"),
        ({"slot_rank": 0}, "slot_rank is 0, expected between 1 and 1024"),
        ({"adapters": "both"}, "adapters is 'both', expected one of 'slots', 'functions'"),
        ({"scheme": "row"}, "scheme is 'row', expected one of 'block', 'channel'"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, Any], expected: str) -> None:
    text = refusal(ConfigError, lambda: settings(**changes))
    assert expected in text and "\n" not in text


def test_a_context_beyond_the_rotary_positions_is_refused() -> None:
    assert request_of(context=4096).context == 4096
    text = refusal(ExportError, lambda: request_of(context=4160))
    assert text == (
        "a context of 4160 tokens, but this model's rotary positions end at 4096; choose 4096 or "
        "less"
    )


def test_bits_are_those_of_a_quantised_base(base8: Path) -> None:
    assert request_of(base=base8).bits == 8
    assert request_of(base=base8, bits=16).bits == 16
    text = refusal(ExportError, lambda: request_of(base=base8, bits=4))
    assert "is quantised to 8 bits, 4 are asked for" in text and "leave out bits (--bits)" in text
    text = refusal(ExportError, lambda: request_of(base=base8, scheme="channel"))
    assert "leave out the scheme (--scheme)" in text


@pytest.mark.parametrize(
    ("mode", "names", "expected"),
    [
        ("fused", [], "fused takes one adapter, 0 are given; slots hold several"),
        ("fused", ["lora", "wide"], "fused takes one adapter, 2 are given; slots hold several"),
        ("functions", [], "functions are made for adapters and none is given; use slots, or none"),
        ("none", ["lora"], "adapters is 'none' and 1 given; use slots, functions or fused"),
    ],
)
def test_a_mode_has_the_adapters_it_takes(
    adapters: dict[str, Path], mode: str, names: list[str], expected: str
) -> None:
    given = {name: adapters[name] for name in names}
    assert refusal(UsageError, lambda: request_of(given, adapters=mode)) == expected


def test_adapters_come_by_name_or_are_named_after_themselves(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "first look" / "adapter"
    make_adapter(run)
    assert set(request_of({"soap": adapters["lora"]}).adapters) == {"soap"}
    given = [adapters["lora"], str(run)]
    # In the order of their names, however they are given.
    assert list(request_of(given).adapters) == ["first_look", "lora"]
    # One path alone is no list of letters.
    assert list(request_of(str(adapters["lora"])).adapters) == ["lora"]
    assert list(request_of(adapters["lora"]).adapters) == ["lora"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["soap", "SOAP"], "'SOAP' is the same as 'soap'"),
        (["a-b", "a_b"], "'a_b' is the same as 'a-b'"),
        (["prefill"], "'prefill' is taken by the model itself"),
        (["../soap"], "'../soap' is no adapter name"),
        (["2soap"], "'2soap' is no adapter name"),
        ([""], "'' is no adapter name"),
        (["a" * 65], "is no adapter name"),
    ],
)
def test_names_that_collide_or_cannot_be_are_refused(
    adapters: dict[str, Path], names: list[str], expected: str
) -> None:
    text = refusal(UsageError, lambda: request_of(dict.fromkeys(names, adapters["lora"])))
    assert expected in text and "Each adapter needs its own" in text and "\n" not in text


def test_two_files_of_one_name_are_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    again = shutil.copyfile(adapters["lora"], tmp_path / "lora.safetensors")
    text = refusal(UsageError, lambda: request_of([adapters["lora"], again]))
    assert "'lora' comes twice" in text


@pytest.mark.parametrize("mode", ["slots", "functions"])
def test_dora_cannot_lie_beside_its_base(adapters: dict[str, Path], mode: str) -> None:
    text = refusal(AdapterError, lambda: request_of({"a": adapters["dora"]}, adapters=mode))
    assert "DoRA rescales rows of the base" in text and "adapters='fused'" in text
    assert request_of({"a": adapters["dora"]}, adapters="fused").notes


def test_slots_hold_the_ranks_they_have(adapters: dict[str, Path]) -> None:
    both = {"a": adapters["lora"], "b": adapters["wide"]}
    assert request_of(both).rank == 16
    assert request_of(both, slot_rank=9).rank == 9
    text = refusal(AdapterError, lambda: request_of(both, slot_rank=8))
    assert "b: rank is 9, the slots have 8: export with slot_rank=9" in text
    assert request_of(both, adapters="functions").rank is None


@pytest.mark.parametrize("mode", ["slots", "functions", "fused"])
def test_an_adapter_of_another_base_is_refused_before_any_work(
    adapters: dict[str, Path], mode: str
) -> None:
    text = refusal(AdapterError, lambda: request_of({"a": adapters["foreign"]}, adapters=mode))
    first = text.splitlines()
    assert "a: " in text and "base" in text and len(first) <= 5
    assert "export with the base it was trained on" in text


def test_an_adapter_keeps_the_quantisation_it_was_trained_with(adapters: dict[str, Path]) -> None:
    given = {"a": adapters["on_load"]}
    assert request_of(given, bits=4).notes == ()
    for changes in (
        {"bits": 16},
        {"bits": 8},
        {"bits": 4, "group_size": 64},
        # One scale for each row is no group of 32.
        {"bits": 4, "scheme": "channel"},
    ):
        text = refusal(AdapterError, lambda changes=changes: request_of(given, **changes))
        assert "trained on this base with 4 bits in groups of 32" in text, changes
        assert "export with bits=4, group_size=32" in text


def test_an_adapter_of_the_plain_weights_is_told_of_the_quantisation(
    adapters: dict[str, Path],
) -> None:
    given = {"a": adapters["lora"]}
    (note,) = request_of(given, bits=4).notes
    assert note == "a: was trained on the plain weights, here they have 4 bits in groups of 32"
    (note,) = request_of(given, bits=4, scheme="channel").notes
    assert note.endswith("here they have 4 bits and one scale per row")
    assert request_of(given, bits=16).notes == ()


@pytest.mark.parametrize("mode", ["slots", "functions", "fused"])
def test_an_adapter_that_was_not_trained_is_refused(tmp_path: Path, mode: str) -> None:
    zero = make_adapter(tmp_path / "zero.safetensors", size=0.0)
    text = refusal(AdapterError, lambda: request_of({"a": zero}, adapters=mode))
    assert text == (
        "a: changes nothing, its lora_b is all zeros as before training; train it or leave it out"
    )
    # A direction that DoRA has rescaled is a change.
    dora = make_adapter(tmp_path / "dora.safetensors", size=0.0, fine_tune_type="dora")
    assert request_of({"a": dora}, adapters="fused").adapters


def test_fusing_says_what_4_bits_would_do_to_a_change(adapters: dict[str, Path]) -> None:
    given = {"a": adapters["lora"]}
    assert request_of(given, adapters="fused", bits=16).notes == ()
    assert "get 8 bits" in request_of(given, adapters="fused", bits=4).notes[0]
    (note,) = request_of(given, adapters="fused", bits=4, scheme="channel").notes
    assert "one scale per row" in note and "take 8 or 16" in note


def test_fusing_keeps_the_bits_of_the_training(adapters: dict[str, Path]) -> None:
    given = {"a": adapters["on_load"]}
    for bits in (4, 16):
        assert request_of(given, adapters="fused", bits=bits).bits == bits
    text = refusal(AdapterError, lambda: request_of(given, adapters="fused", bits=8))
    assert text == (
        "a: was trained on this base with 4 bits, 8 are asked for; export with bits=4 or 16"
    )


@pytest.mark.parametrize(
    ("base", "adapter", "kind"),
    [
        ("nowhere/model", (), CheckpointError),
        (str(MINI), {"a": "nowhere.safetensors"}, AdapterError),
        (str(MINI), {"a": str(MINI)}, AdapterError),
    ],
)
def test_what_is_not_there_is_named(base: str, adapter: Any, kind: type[MedPhiError]) -> None:
    with pytest.raises(MedPhiError) as caught:
        make_request(base, adapter, settings(), offline=True)
    text = str(caught.value)
    assert "nowhere" in text or "mini-4k" in text
    assert "\n" not in text


def old_bundle(path: Path) -> Path:
    """What looks like a bundle that an export wrote."""
    (path / "model").mkdir(parents=True)
    (path / METADATA).write_text("{}")
    (path / "model" / "weights").write_bytes(b"1234")
    write_sums(path)
    return path


@pytest.mark.parametrize("name", ["notes", "notes.mlpackage", "notes.medphi.zip", ".medphi"])
def test_a_bundles_name_ends_in_medphi(tmp_path: Path, name: str) -> None:
    text = refusal(UsageError, lambda: check_place(tmp_path / name, (), False))
    assert "a bundle's name ends in .medphi, as in notes.medphi" in text


def test_a_free_place_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "new" / "notes.medphi"
    assert check_place(out, [MINI], False) == out
    assert check_place(out, [MINI], True) == out
    assert not out.parent.exists()


def test_what_is_there_stays_unless_it_is_a_bundle(tmp_path: Path) -> None:
    out = old_bundle(tmp_path / "notes.medphi")
    text = refusal(ExportError, lambda: check_place(out, (), False))
    assert "exists already; choose another name, or replace it (--replace)" in text
    assert check_place(out, (), True) == out
    for name in ("file.medphi", "folder.medphi", "dangling.medphi"):
        place = tmp_path / name
        if name.startswith("file"):
            place.write_text("mine")
        elif name.startswith("folder"):
            place.mkdir()
        else:
            place.symlink_to(tmp_path / "nowhere")
        text = refusal(ExportError, lambda place=place: check_place(place, (), False))
        assert "exists already" in text
        text = refusal(ExportError, lambda place=place: check_place(place, (), True))
        assert text == f"{place}: is not a bundle; only bundles are replaced"


def test_files_that_export_did_not_write_are_not_replaced(tmp_path: Path) -> None:
    out = old_bundle(tmp_path / "notes.medphi")
    (out / "model" / "my results.csv").write_text("mine")
    text = refusal(ExportError, lambda: check_place(out, (), True))
    assert text == (
        f"{out}: holds model/my results.csv, which export did not write; move what you want to keep"
    )
    (out / "model" / "my results.csv").unlink()
    (out / SUMS).write_text("not sums")
    text = refusal(ExportError, lambda: check_place(out, (), True))
    assert "only whole bundles are replaced" in text


def test_a_link_to_a_bundle_is_as_the_bundle(tmp_path: Path) -> None:
    old_bundle(tmp_path / "real.medphi")
    link = tmp_path / "link.medphi"
    link.symlink_to(tmp_path / "real.medphi")
    assert "exists already" in refusal(ExportError, lambda: check_place(link, (), False))
    assert check_place(link, (), True) == link
    # The place it leads to counts.
    text = refusal(ExportError, lambda: check_place(link, [tmp_path / "real.medphi"], True))
    assert "overlaps" in text


@pytest.mark.parametrize(
    ("out", "source"),
    [
        ("base.medphi", "base.medphi"),
        ("base/notes.medphi", "base"),
        ("run.medphi", "run.medphi/adapter"),
        ("base/../base/deep/notes.medphi", "base"),
    ],
)
def test_a_bundle_does_not_touch_what_is_read(tmp_path: Path, out: str, source: str) -> None:
    (tmp_path / "base").mkdir()
    read = tmp_path / source
    text = refusal(ExportError, lambda: check_place(tmp_path / out, [read], True))
    assert text == f"{tmp_path / out}: overlaps {read}, which is read; choose another place"


def test_a_full_disk_is_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(place: Path) -> Usage:
        asked.append(Path(place))
        return Usage(10**12, 10**12 - 3_000_000_000, 3_000_000_000)

    monkeypatch.setattr("mlx_medphi.coreml.request.shutil.disk_usage", disk_usage)
    out = tmp_path / "new" / "notes.medphi"
    check_space(out, 2_900_000_000)
    text = refusal(ExportError, lambda: check_space(out, 2_940_000_000))
    assert text == (
        f"{out}: needs 3.00 GB while it is made, {tmp_path} has 3.00 GB free; make room or choose "
        "another disk"
    )
    # Of the disk the bundle will lie on.
    assert asked == [tmp_path.resolve()] * 2


def test_room_is_looked_for_where_a_link_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    free = Usage(1, 0, 10**12)
    monkeypatch.setattr(
        "mlx_medphi.coreml.request.shutil.disk_usage", lambda p: asked.append(Path(p)) or free
    )
    (tmp_path / "disk" / "old.medphi").mkdir(parents=True)
    link = tmp_path / "notes.medphi"
    link.symlink_to(tmp_path / "disk" / "old.medphi")
    check_space(link, 1)
    assert asked == [(tmp_path / "disk").resolve()]


def test_a_request_knows_what_a_plain_base_becomes(base8: Path) -> None:
    plain = request_of()
    assert plain.on_load == (4, 32)
    assert replace(plain, config=settings(bits=4, scheme="channel")).on_load == (4, 0)
    assert request_of(bits=16).on_load is None
    assert request_of(base=base8).on_load is None and not request_of(base=base8).quantizes
