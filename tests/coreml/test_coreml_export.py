"""An export is a verified bundle that says what was done, or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from export_cases import (
    MINI,
    contents,
    largest_difference,
    make_adapter,
    one_block,
    quantised_base,
    settings,
)

import mlx_medphi as mp
from mlx_medphi.coreml.bundle import Bundle, open_bundle
from mlx_medphi.coreml.certificate import read_golden
from mlx_medphi.coreml.export import export, plan_export
from mlx_medphi.coreml.golden import Golden, rows_of
from mlx_medphi.coreml.manifest_program import Stored
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.verify import ParityReport, verify
from mlx_medphi.errors import ExportError, MedPhiError, ParityError, UsageError
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.slot_pack_read import read_pack
from mlx_medphi.model.weights import open_checkpoint

Usage = namedtuple("Usage", "total used free")
Adapters = Mapping[str, Path]
Told = list[tuple[str, int, int]]
# Sizes are planned from shapes; what is estimated is the text of the program, which is a third of
# so small a package.
PLANNED = 0.06
# Of the largest logit; the same weights in MLX twice.
SAME = 1e-5
# The same but for scales, which are float16 in a package: 2**-11 of a weight, over a few hundred.
ROUNDED = 2e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_block(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Adapters:
    """Two adapters of the base, of different rank."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "soap": make_adapter(folder / "soap.safetensors", base),
        "letter": make_adapter(folder / "letter.safetensors", base, rank=8, seed=2),
    }


@pytest.fixture(scope="module")
def on_load(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter that was trained on the base quantised on loading."""
    path = tmp_path_factory.mktemp("on_load") / "soap.safetensors"
    return make_adapter(path, base, quantize=(4, 32))


def package_bytes(bundle: Bundle) -> int:
    return sum(path.stat().st_size for path in bundle.package.rglob("*") if path.is_file())


def alone(bundle: Path) -> bool:
    """Whether nothing lies beside a bundle, hidden or not."""
    return [path.name for path in bundle.parent.iterdir()] == [bundle.name]


# Adapters come in five forms.
FORMS = {
    "states": {"adapters": "slots", "slot_kind": "state"},
    "inputs": {"adapters": "slots", "slot_kind": "input"},
    "functions": {"adapters": "functions"},
    "fused": {"adapters": "fused"},
    "none": {"adapters": "none"},
}


# Fast are one of each form and one of each number of bits; what a form is has its own tests.
DAILY = {("states", 4), ("states", 8), ("functions", 16), ("fused", 4)}


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        pytest.param(form, bits, marks=[] if (form, bits) in DAILY else [pytest.mark.slow])
        for form in FORMS
        for bits in (16, 8, 4)
    ],
)
def test_every_form_is_exported_as_its_manifest_says_and_verified_again(
    base: Path, two: Adapters, tmp_path: Path, form: str, bits: int
) -> None:
    given = {"fused": {"soap": two["soap"]}, "none": {}}.get(form, two)
    config = settings(bits=bits, **FORMS[form])
    plan = plan_export(base, adapters=given, config=config)
    out = tmp_path / "out" / "notes.medphi"
    bundle = export(base, out, adapters=given, config=config)
    assert bundle.path == out and alone(out)
    assert {path.name for path in out.iterdir() if path.is_dir()} <= {
        "adapters",
        "model",
        "tokenizer",
    }
    facts = bundle.manifest.medphi

    # Codes, and what they are grouped by; a change that is folded in would be lost in 4 bits.
    coded = Stored(16, None) if bits == 16 else Stored(8, 32)
    assert (facts.quantization.embedding, facts.quantization.head) == (coded, coded)
    assert facts.quantization.bits == (8 if (form, bits) == ("fused", 4) else bits)
    assert facts.quantization.group == (None if bits == 16 else 32)
    assert facts.quantization.source == ("none" if bits == 16 else "exported")
    told = "float16" if bits == 16 else f"{facts.quantization.bits}-bit per-block g32"
    assert bundle.manifest.compression.startswith(told)

    # The sheet is of the package that lies there, and the plan was near it.
    size, weights = package_bytes(bundle), bundle.package / "Data/com.apple.CoreML/weights"
    assert facts.cost["package_bytes"] == size
    assert facts.memory.weights == (weights / "weight.bin").stat().st_size
    assert plan.cost.package_bytes == pytest.approx(size, rel=PLANNED)
    assert plan.needed_bytes >= size

    # Adapters, each where its form has it.
    assert facts.adapters.mode == FORMS[form]["adapters"]
    assert facts.adapters.slot_kind == FORMS[form].get("slot_kind")
    assert facts.adapters.rank_slot == (8 if "slot_kind" in FORMS[form] else None)
    ranks = {"soap": 4, "letter": 8}
    entries = {entry.name: entry for entry in facts.adapters.list}
    assert {name: entry.rank for name, entry in entries.items()} == {n: ranks[n] for n in given}
    assert set(bundle.adapters) == (set(given) if "slot_kind" in FORMS[form] else set())
    assert len(facts.coreml.functions) == (6 if form == "functions" else 2)
    signature = facts.coreml.functions["decode"]
    slots = [tensor.name for tensor in signature.states if tensor.name.startswith("lora")]
    inputs = [tensor.name for tensor in signature.inputs if tensor.name.startswith("lora")]
    assert (len(slots), len(inputs)) == {"states": (8, 0), "inputs": (0, 8)}.get(form, (0, 0))

    # What is said of the verification is what a verification finds.
    cases = {"fused": {"note-base"}, "none": {"note-base"}}.get(
        form, {"note-base", "note-soap", "note-letter"}
    )
    assert bundle.level == "graph" and facts.verification.graph is not None
    report = verify(bundle)
    assert report.graph is not None and report.passed
    written = [dict(case) for case in facts.verification.graph["cases"]]
    assert written == report.to_dict()["graph"]["cases"]
    assert {case.name for case in report.graph.cases} == cases
    assert report.graph.swaps is (True if "slot_kind" in FORMS[form] else None)
    assert facts.verification.spec == {**report.spec.to_dict()}

    # How far the exported weights are from those that were trained on, where they are others.
    fidelity = {case["name"]: case for case in facts.verification.graph["fidelity"]}
    made = form == "fused" or bits < 16
    assert set(fidelity) == (cases if made else set())
    limit = {16: 1e-6, 8: 1e-3, 4: 0.1}[16 if bits == 16 else facts.quantization.bits]
    assert all(0 <= case["kl"] < limit for case in fidelity.values())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base: Path, two: Adapters) -> Bundle:
    """16 bits with two adapters in slots."""
    out = tmp_path_factory.mktemp("bundle") / "notes.medphi"
    return export(base, out, adapters=two, config=settings(bits=16, author="A. Author"))


def test_a_bundle_is_complete_and_for_everybody_to_read(bundle: Bundle) -> None:
    found = contents(bundle.path)
    assert {"metadata.json", "parity.json", "parity.safetensors", "SHA256SUMS"} <= found.keys()
    assert not [name for name in found if "staging" in name or name.startswith(".")]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in bundle.path.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_the_package_says_whose_it_is(bundle: Bundle) -> None:
    metadata = open_package(bundle.package).metadata
    assert metadata["author"] == "A. Author"
    assert metadata["mlx_medphi.base_fingerprint"] == bundle.manifest.medphi.base_fingerprint
    assert metadata["mlx_medphi.bits"] == "16" and metadata["mlx_medphi.adapters"] == "slots"


def test_packs_hold_the_adapters_and_their_training(bundle: Bundle, two: Adapters) -> None:
    entries = {entry.name: entry for entry in bundle.manifest.medphi.adapters.list}
    for name, path in bundle.adapters.items():
        pack = read_pack(path)
        assert (pack.name, pack.rank) == (name, entries[name].rank)
        assert pack.base_fingerprint == bundle.manifest.medphi.base_fingerprint
        assert pack.base_id == "small"
    assert mp.adapter_info(two["letter"]).rank == entries["letter"].rank


def test_a_quantised_base_keeps_its_own_codes(tmp_path: Path, base: Path) -> None:
    stored = quantised_base(tmp_path / "mini-4bit", 4, base=base)
    adapter = make_adapter(tmp_path / "soap.safetensors", stored)
    bundle = export(stored, tmp_path / "a.medphi", adapters=[adapter], config=settings())
    facts = bundle.manifest.medphi
    assert (facts.quantization.source, facts.quantization.bits) == ("mlx", 4)
    # Embeddings of 4 bits take a byte for each code; everything else stays as it was.
    assert facts.quantization.embedding == Stored(8, 32) and facts.quantization.head == Stored(
        4, 32
    )
    assert facts.quantization.error is not None and facts.quantization.error < 1e-3
    # These are the weights that were trained on.
    assert facts.verification.graph is not None and facts.verification.graph["fidelity"] == []


def test_a_change_is_folded_into_a_quantised_base_in_8_bits(tmp_path: Path, base: Path) -> None:
    stored = quantised_base(tmp_path / "mini-4bit", 4, base=base)
    adapter = make_adapter(tmp_path / "soap.safetensors", stored, keys=("self_attn.o_proj",))
    config = settings(adapters="fused")
    bundle = export(stored, tmp_path / "a.medphi", adapters=[adapter], config=config)
    facts = bundle.manifest.medphi
    # One layer of four has 8 bits; the others keep their codes.
    assert facts.quantization.bits == 4
    plan = plan_export(stored, adapters=[adapter], config=config)
    o_proj = plan.cost.package["o"]
    assert o_proj == bundle.manifest.medphi.cost["package"]["o"]
    assert o_proj == 64 * 64 + 3 * 64 * 2  # codes, and for each group a scale of 2 and an offset
    assert facts.verification.graph is not None
    (case,) = facts.verification.graph["fidelity"]
    assert case["kl"] < 1e-3


def test_an_adapter_trained_on_a_base_quantised_on_loading_gets_that_base(
    base: Path, on_load: Path, tmp_path: Path
) -> None:
    config = settings(bits=4)
    plan = plan_export(base, adapters=[on_load], config=config)
    bundle = export(base, tmp_path / "a.medphi", adapters=[on_load], config=config)
    facts = bundle.manifest.medphi
    assert plan.cost.package_bytes == pytest.approx(package_bytes(bundle), rel=PLANNED)
    assert plan.cost.package["embedding"] == facts.cost["package"]["embedding"]
    assert plan.cost.package["head"] == facts.cost["package"]["head"]
    # Embedding and head as well, against the settings' 8 bits.
    assert facts.quantization.head == Stored(4, 32)
    assert facts.verification.graph is not None
    assert max(case["error"] for case in facts.verification.graph["fidelity"]) < ROUNDED
    # The golden logits are those of the model that was trained.
    model = build_model(open_checkpoint(base), dtype="float32", quantize=(4, 32))
    mp.load_adapter(model, on_load)
    (case,) = read_golden(bundle.path).of("soap")
    wanted = rows_of(model, case)
    assert largest_difference(case.logits, wanted) < ROUNDED * np.abs(wanted).max()
    assert read_pack(bundle.adapters["soap"]).base_fingerprint.endswith("-q4g32")


def test_layers_that_loading_leaves_plain_stay_plain(base: Path, tmp_path: Path) -> None:
    # 64 divides all widths but that of down_proj, which MLX leaves as it is.
    adapter = make_adapter(tmp_path / "soap.safetensors", base, quantize=(4, 64))
    config = settings(bits=4, group_size=64)
    bundle = export(base, tmp_path / "a.medphi", adapters=[adapter], config=config)
    facts = bundle.manifest.medphi
    assert facts.verification.graph is not None
    assert max(case["error"] for case in facts.verification.graph["fidelity"]) < ROUNDED
    assert facts.cost["package"]["down"] == 2 * 64 * 96
    plan = plan_export(base, adapters=[adapter], config=config)
    assert plan.cost.package["down"] == 2 * 64 * 96


@pytest.mark.parametrize("adapters", ["slots", "fused"])
def test_one_scale_for_each_row(base: Path, two: Adapters, tmp_path: Path, adapters: str) -> None:
    config = settings(bits=8, scheme="channel", adapters=adapters)
    given = {"soap": two["soap"]}
    bundle = export(base, tmp_path / "a.medphi", adapters=given, config=config)
    facts = bundle.manifest.medphi
    assert (facts.quantization.scheme, facts.quantization.group) == ("channel", None)
    assert bundle.manifest.compression.startswith("8-bit per-channel, integer offset")
    plan = plan_export(base, adapters=given, config=config)
    assert plan.cost.package_bytes == pytest.approx(package_bytes(bundle), rel=PLANNED)


def test_rows_of_a_base_quantised_on_loading_are_fused_from_plain_numbers(
    base: Path, on_load: Path, tmp_path: Path
) -> None:
    config = settings(bits=8, scheme="channel", adapters="fused")
    bundle = export(base, tmp_path / "a.medphi", adapters=[on_load], config=config)
    assert bundle.manifest.medphi.quantization.scheme == "channel"
    assert bundle.manifest.medphi.verification.graph is not None
    (case,) = bundle.manifest.medphi.verification.graph["fidelity"]
    assert case["kl"] < 1e-2


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(
    bundle: Bundle, base: Path, two: Adapters, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere" / base.name))
    given = {
        name: shutil.copyfile(path, tmp_path / f"{name}-copy.safetensors")
        for name, path in reversed(two.items())
    }
    config = settings(bits=16, author="A. Author")
    again = export(
        moved, tmp_path / "deep" / "down" / "notes.medphi", adapters=given, config=config
    )
    first, second = contents(bundle.path), contents(again.path)
    assert [name for name in first | second if first.get(name) != second.get(name)] == []
    # No folder of this machine, wherever bytes are looked at.
    for place in (bundle.path.parent, tmp_path, two["soap"].parent, base.parent, Path.home()):
        assert not [name for name, data in first.items() if str(place).encode() in data]


def test_a_list_of_adapters_gives_the_bytes_of_a_mapping(
    bundle: Bundle, base: Path, two: Adapters, tmp_path: Path
) -> None:
    config = settings(bits=16, author="A. Author")
    again = export(base, tmp_path / "notes.medphi", adapters=list(two.values()), config=config)
    assert contents(again.path) == contents(bundle.path)


def test_the_date_is_that_of_source_date_epoch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []

    def made(name: str) -> Bundle:
        told.clear()
        return export(
            base, tmp_path / name / "notes.medphi", level="spec",
            config=settings(bits=16, adapters="none"), progress=lambda *step: told.append(step),
        )  # fmt: skip

    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    none = made("none")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")
    dated = made("dated")
    assert none.manifest.compilation.date == "1970-01-01T00:00:00Z"
    assert dated.manifest.compilation.date == "2025-06-15T15:06:40Z"
    # Nothing else may depend on the day.
    first, second = contents(none.path), contents(dated.path)
    changed = {name for name in first if first[name] != second[name]}
    assert changed <= {"metadata.json", "README.md", "SHA256SUMS"}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "tomorrow")
    with pytest.raises(ExportError, match="SOURCE_DATE_EPOCH is 'tomorrow'"):
        made("never")
    # Before any work.
    assert told == []
    assert not list((tmp_path / "never").iterdir())


def stages_of(told: Told) -> list[str]:
    """Each stage once, in order; every one runs from its start to its end without going back."""
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    for stage in stages:
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps) and len({total for _, total in steps}) == 1, stage
        assert steps[-1][0] == steps[-1][1], stage
    assert [step[0] for step in told] == sorted((s[0] for s in told), key=stages.index)
    return stages


def test_stages_are_told_in_order_and_to_their_end(
    base: Path, two: Adapters, tmp_path: Path
) -> None:
    told: Told = []
    given = {"soap": two["soap"]}
    config = settings(bits=4, adapters="fused")
    bundle = export(
        base, tmp_path / "a.medphi", adapters=given, config=config,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert stages_of(told) == ["fuse", "quantise", "graph", "weights", "golden", "run"]
    told.clear()
    verify(bundle, progress=lambda *step: told.append(step))
    assert stages_of(told) == ["files", "run"]
    told.clear()
    export(
        base, tmp_path / "b.medphi", config=settings(bits=16), level="spec",
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert stages_of(told) == ["graph", "weights"]


def test_a_bundle_without_golden_logits_reaches_spec(base: Path, tmp_path: Path) -> None:
    bundle = export(base, tmp_path / "a.medphi", config=settings(bits=16), level="spec")
    assert bundle.level == "spec" and bundle.manifest.medphi.verification.graph is None
    assert json.loads(bundle.parity.read_text())["cases"] == []
    report = verify(bundle)
    assert report.level == "spec" and report.graph is None
    for level in ("graph", "predict"):
        with pytest.raises(UsageError, match="golden logits|needs a Mac"):
            verify(bundle, level)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("all", "level is 'all', expected one of spec, graph, predict"),
        ("predict", "level predict runs Core ML, which needs a Mac"),
    ],
)
def test_a_level_that_cannot_be_reached_is_told_before_any_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Any, expected: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    told: Told = []
    with pytest.raises(UsageError, match=expected):
        export(
            base, tmp_path / "a.medphi", config=settings(), level=level,
            progress=lambda *step: told.append(step),
        )  # fmt: skip
    assert told == [] and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bundle = export(base, "~/a.medphi", config=settings(bits=16), level="spec")
    assert bundle.path == tmp_path / "a.medphi" and bundle.package.is_dir()
    assert verify("~/a.medphi").passed


def test_a_plan_writes_nothing_and_checks_what_an_export_does(
    base: Path, two: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_export(base, tmp_path / "a.medphi", adapters=two, config=settings())
    assert (plan.base, plan.adapters, plan.slot_rank) == ("small", ("letter", "soap"), 8)
    assert (plan.config.bits, plan.config.context) == (4, 64)
    assert [note.split(":")[0] for note in plan.notes[:2]] == ["letter", "soap"]
    assert plan.notes[2].startswith("a plain base gets 4 bits unless --bits (bits) says otherwise")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="a bundle's name ends in .medphi"):
        plan_export(base, tmp_path / "a", config=settings())
    (tmp_path / "a.medphi").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        plan_export(base, tmp_path / "a.medphi", config=settings())
    with pytest.raises(ExportError, match="is not a bundle"):
        plan_export(base, tmp_path / "a.medphi", config=settings(), replace=True)
    free = Usage(10**9, 10**9, 0)
    monkeypatch.setattr("mlx_medphi.coreml.request.shutil.disk_usage", lambda place: free)
    with pytest.raises(ExportError, match="needs 0.06 GB while it is made"):
        plan_export(base, tmp_path / "b.medphi", config=settings())


def test_groups_that_do_not_divide_are_refused_with_those_that_do(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export(base, tmp_path / "a.medphi", config=settings(group_size=64))
    text = str(caught.value)
    assert "groups of 64 do not divide the width of 1 layer" in text
    assert "model.layers.0.mlp.down_proj (width 96); take a group size of 32" in text
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_the_start(
    base: Path, two: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    free = Usage(10**9, 10**9, 1_000_000)
    monkeypatch.setattr(
        "mlx_medphi.coreml.request.shutil.disk_usage", lambda p: asked.append(p) or free
    )
    told: Told = []
    with pytest.raises(ExportError, match=r"needs 0\.06 GB while it is made, .* 0\.00 GB free"):
        export(
            base, tmp_path / "a.medphi", adapters=two, config=settings(),
            progress=lambda *step: told.append(step),
        )  # fmt: skip
    assert asked and told == [] and not list(tmp_path.iterdir())


def test_room_is_asked_for_all_that_is_made_on_the_way(base: Path, two: Adapters) -> None:
    def needed(**changes: Any) -> tuple[int, int]:
        given = {} if changes["adapters"] == "none" else {"soap": two["soap"]}
        plan = plan_export(base, adapters=given, config=settings(**changes))
        return plan.needed_bytes, plan.cost.package_bytes

    stored = open_checkpoint(base).nbytes
    for changes, copies in (
        ({"bits": 16, "adapters": "none"}, 1),
        ({"bits": 4, "adapters": "none"}, 2),  # and a quantised checkpoint
        ({"bits": 8, "scheme": "channel", "adapters": "none"}, 1),
    ):
        room, package = needed(**changes)
        assert room >= copies * package, changes
    room, package = needed(bits=4, adapters="fused")
    assert room >= 2 * package + stored


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A bundle that another export wrote."""
    out = tmp_path_factory.mktemp("older") / "notes.medphi"
    return export(base, out, config=settings(bits=16, adapters="none"), level="spec").path


@pytest.fixture
def place(older: Path, tmp_path: Path) -> Iterator[Path]:
    """An older bundle, to be replaced by an export that fails: it must be there afterwards."""
    out = Path(shutil.copytree(older, tmp_path / "out" / "notes.medphi"))
    before = contents(out)
    yield out
    assert alone(out) and contents(out) == before


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Path]:
    """Where nothing is, and nothing must be after an export that fails."""
    out = tmp_path / "out" / "notes.medphi"
    out.parent.mkdir()
    yield out
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("stage", ["fuse", "quantise", "graph", "weights", "golden", "run"])
def test_an_export_that_is_stopped_leaves_the_older_bundle(
    base: Path, two: Adapters, place: Path, stage: str
) -> None:
    def stop(at: str, done: int, total: int) -> None:
        if at == stage:
            raise KeyboardInterrupt

    mode = "fused" if stage == "fuse" else "slots"
    with pytest.raises(KeyboardInterrupt):
        export(
            base, place, adapters={"soap": two["soap"]}, replace=True, progress=stop,
            config=settings(bits=4, adapters=mode),
        )  # fmt: skip


@pytest.mark.parametrize("stage", ["quantise", "run"])
def test_an_export_that_is_stopped_leaves_nothing(base: Path, nowhere: Path, stage: str) -> None:
    error = ValueError("a listener's own")

    def stop(at: str, done: int, total: int) -> None:
        if at == stage:
            raise error

    with pytest.raises(ValueError) as caught:
        export(base, nowhere, progress=stop, config=settings(bits=4, adapters="none"))
    assert caught.value is error


def full(*given: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weight.bin")


@pytest.mark.parametrize(
    "writer",
    [
        "mlx_medphi.model.fuse_write.write_pieces",
        "mlx_medphi.coreml.staging.write_pieces",
        "mlx_medphi.coreml.build.write_program",
        "mlx_medphi.coreml.build.BlobWriter.append",
        "mlx_medphi.coreml.slot_file.write_pieces",
        "mlx_medphi.coreml.certificate.write_pieces",
        "mlx_medphi.coreml.bundle_write.write_text",
        "mlx_medphi.coreml.sums.write_text",
    ],
)
def test_a_disk_that_becomes_full_leaves_the_older_bundle(
    base: Path, two: Adapters, place: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    monkeypatch.setattr(writer, full)
    given = {"soap": two["soap"]}
    config = settings(bits=4, adapters="fused" if "fuse_write" in writer else "slots")
    with pytest.raises(ExportError) as caught:
        export(base, place, adapters=given, replace=True, config=config)
    assert str(caught.value) == (
        f"{place}: cannot be written (No space left on device); what was there is unchanged"
    )


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets this process write no file beyond a size, by the system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [500, 6_000, 30_000, 100_000])
def test_a_system_that_refuses_to_write_leaves_nothing(
    base: Path, two: Adapters, nowhere: Path, small_files: Callable[[int], None], size: int
) -> None:
    small_files(size)
    with pytest.raises(ExportError) as caught:
        export(base, nowhere, adapters=two, config=settings(bits=16))
    assert str(caught.value) == (
        f"{nowhere}: cannot be written (File too large); what was there is unchanged"
    )


def test_a_place_that_cannot_be_made_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "notes.medphi"
    with pytest.raises(ExportError, match=r"notes\.medphi: cannot be written"):
        export(base, out, config=settings(bits=16))
    assert (tmp_path / "file").read_text() == "mine"


def doctored(golden: Golden) -> Golden:
    """Golden logits of another model."""
    return Golden(tuple(replace(case, logits=case.logits[:, ::-1].copy()) for case in golden.cases))


def test_a_package_that_is_not_the_model_never_gets_its_name(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_medphi.coreml.golden import make_golden

    monkeypatch.setattr(
        "mlx_medphi.coreml.export.make_golden",
        lambda *given, **more: doctored(make_golden(*given, **more)),
    )
    with pytest.raises(ParityError) as caught:
        export(base, place, replace=True, config=settings(bits=16))
    text, report = str(caught.value), caught.value.report
    first, *others = text.splitlines()
    assert first.startswith("notes.medphi: note-base: a logit is off by ")
    assert first.endswith(f"(and {len(others)} more); nothing was written")
    assert str(place.parent) not in text
    assert isinstance(report, ParityReport) and not report.passed
    assert report.graph is not None and report.graph.cases[0].error > 0.02


def test_an_older_bundle_is_replaced_once_the_new_one_is_verified(
    base: Path, older: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(older, tmp_path / "notes.medphi"))
    before = contents(out)
    with pytest.raises(ExportError, match="exists already"):
        export(base, out, config=settings())
    seen: list[bool] = []
    bundle = export(
        base, out, replace=True, config=settings(),
        progress=lambda *step: seen.append(contents(out) == before),
    )  # fmt: skip
    assert seen and all(seen)
    assert alone(out) and bundle.level == "graph"
    assert open_bundle(out).manifest.medphi.quantization.bits == 4


def test_a_bundle_that_another_program_made_meanwhile_stays(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.medphi"

    def make(stage: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("theirs")

    with pytest.raises(ExportError, match="cannot be written .File exists.; what was there"):
        export(base, out, config=settings(bits=16), level="spec", progress=make)
    assert alone(out) and contents(out) == {"theirs": b"theirs"}


def test_a_link_stays_a_link_to_the_new_bundle(base: Path, older: Path, tmp_path: Path) -> None:
    real = Path(shutil.copytree(older, tmp_path / "disk" / "real.medphi"))
    link = tmp_path / "notes.medphi"
    link.symlink_to(real)
    export(base, link, replace=True, config=settings(), level="spec")
    assert link.is_symlink() and open_bundle(real).manifest.medphi.quantization.bits == 4
    assert alone(real)


KILLED = """
import os, signal, sys
import mlx_medphi as mp

def die(stage, done, total):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

config = mp.ExportConfig(context=64, prefill=16, bits=16)
mp.export(sys.argv[1], sys.argv[2], config=config, replace=True, progress=die)
"""


def kill_an_export(base: Path, out: Path, stage: str) -> None:
    line = [sys.executable, "-c", KILLED, str(base), str(out), stage]
    done = subprocess.run(line, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_the_older_bundle_whole(
    base: Path, older: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(older, tmp_path / "notes.medphi"))
    before = contents(out)
    kill_an_export(base, out, "run")
    assert contents(out) == before
    # What lies beside it is hidden, and in nobody's way.
    assert [path.name[0] for path in tmp_path.iterdir() if path != out] == ["."]
    export(base, out, replace=True, config=settings(bits=16), level="spec")
    open_bundle(out)


@pytest.mark.slow  # each needs a process that loads everything again
@pytest.mark.parametrize("stage", ["graph", "weights", "run"])
def test_an_export_that_is_killed_leaves_no_bundle(base: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "notes.medphi"
    kill_an_export(base, out, stage)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"context": 4160}, ()),
        ({"adapters": "functions"}, ()),
        ({"slot_rank": 2}, "soap"),
        ({"bits": 4, "scheme": "channel"}, "on_load"),
    ],
)
def test_what_is_refused_leaves_nothing(
    base: Path, two: Adapters, on_load: Path, place: Path, changes: dict[str, Any], given: str
) -> None:
    adapters = {"soap": {**two, "on_load": on_load}[given]} if given else ()
    with pytest.raises(MedPhiError):
        export(base, place, adapters=adapters, config=settings(**changes), replace=True)


@pytest.mark.slow
def test_mini_itself_at_4_bits_in_a_full_context(tmp_path: Path) -> None:
    """Two blocks, and a context that is longer than the prompt, so that its edge is run too."""
    adapter = make_adapter(tmp_path / "soap.safetensors", MINI)
    config = settings(bits=4, context=128)
    bundle = export(MINI, tmp_path / "a.medphi", adapters=[adapter], config=config)
    report = verify(bundle, layers=True)
    assert report.graph is not None
    names = [case.name for case in report.graph.cases]
    assert names == ["note-base", "edge-base", "note-soap", "edge-soap"]
    assert len(report.graph.hidden) == 2 and min(report.graph.hidden) > 0
    assert mx.isfinite(mx.array(report.graph.hidden)).all().item()
