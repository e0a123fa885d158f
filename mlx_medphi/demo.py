"""The whole path on the embedded base and sample: train, write notes, keep, fuse, export, verify.

The base is a tiny model in Phi-3's form and the conversations are made up; both were made by this
project. Nothing is fetched, no patient is in it, and nothing it writes is advice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlx_medphi.config import ExportConfig, GenerateConfig, LoRAConfig, TrainConfig
from mlx_medphi.coreml.bundle import Bundle
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.rehearse import rehearse
from mlx_medphi.data.examples import Example
from mlx_medphi.data.synthetic import Facts, facts, parse_note, sample
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.fuse import FuseReport, fuse
from mlx_medphi.model.fuse_text import text_rows
from mlx_medphi.model.generate import generate_note
from mlx_medphi.model.phi3 import Phi3ForCausalLM, parameter_count
from mlx_medphi.text.tokenizer import Tokenizer
from mlx_medphi.training.events import Event
from mlx_medphi.training.loop import train
from mlx_medphi.training.result import TrainResult

__all__ = ["BASE", "DemoResult", "DemoSettings", "Exported", "Notes", "Prepared", "run_demo"]

BASE = Path(__file__).parent / "assets" / "tiny"
ADAPTER_FILE, BUNDLE_NAME, ADAPTER_NAME = "medical_changes.safetensors", "notes.medphi", "soap"
GENERATE = GenerateConfig(max_tokens=96)


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        train_rows: conversations to learn from.
        valid_rows: conversations to measure the loss on, with names and drugs never trained on.
        held_out: further ones to write notes for.
        fuse_rows: how many of the measured ones the fused model is compared on.
        train: the training settings.
        lora: the adapter settings.
        export: how the bundle is made; 16 bits, as a base this small has no weight to spare.
    """

    train_rows: int = 320
    valid_rows: int = 16
    held_out: int = 8
    # A few settle it: they are some 600 tokens, and float16 is slow on processors.
    fuse_rows: int = 4
    train: TrainConfig = TrainConfig(
        iters=80,
        learning_rate=4e-3,
        warmup=0.05,
        weight_decay=0.0,
        batch_size=4,
        max_length=512,
        eval_every=20,
    )
    lora: LoRAConfig = LoRAConfig(rank=16, scale=2.0, dropout=0.0)
    export: ExportConfig = ExportConfig(bits=16, context=512)


@dataclass(frozen=True)
class Prepared:
    """What the demo starts from."""

    parameters: int
    base_bytes: int
    train_rows: int
    held_out: int


@dataclass(frozen=True)
class Notes:
    """Notes for the held-out conversations at one moment.

    Attributes:
        moment: "before", "after" or "fused".
        examples: the conversations, each with the note it should get.
        notes: what was written.
        formed: how many are notes of the form that the sample teaches.
        right: facts (name, age, complaint, drug, dose, …) in these that are as in the conversation.
        facts: facts in all conversations.
        seconds: how long writing took.
    """

    moment: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...]
    formed: int
    right: int
    facts: int
    seconds: float


@dataclass(frozen=True)
class Exported:
    """The bundle, and the first held-out conversation's note as the saved package writes it.

    Attributes:
        bundle: verified and opened.
        note: written by the interpreter, from the files of the bundle alone.
        same: whether it is the note that the adapted model wrote.
        seconds: how long exporting, verifying and writing took.
    """

    bundle: Bundle
    note: str
    same: bool
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed; every file lies below `out`."""

    out: Path
    result: TrainResult
    before: Notes
    after: Notes
    fused: Notes
    report: FuseReport
    exported: Exported
    adapter_bytes: int
    seconds: float

    @property
    def same_notes(self) -> bool:
        """Whether the fused model wrote every note as the adapted one did."""
        return self.after.notes == self.fused.notes


def run_demo(
    out: Path,
    *,
    settings: DemoSettings = DemoSettings(),
    on_event: Callable[[Prepared | Notes | Event | FuseReport | Exported], None],
) -> DemoResult:
    """Train an adapter for the embedded base on the embedded sample, keep it, fuse it, export it.

    Args:
        out: a new directory.
        settings: how much is done.
        on_event: called with what has been reached: `Prepared`, `Notes`, training's own events,
            the fuse's report, `Exported`.

    Raises:
        KeyboardInterrupt: training was stopped from the keyboard.
        TrainingError: `out` is in use.
        FuseError: the fused model is not the adapted one.
        ParityError: the saved package is not the model.
    """
    begun = time.monotonic()
    # float32: processors have no fast float16, and the base is small.
    model, tokenizer = load(BASE, dtype="float32")
    learned = sample(settings.train_rows, seed=1)
    measured = sample(settings.valid_rows, seed=2, held_out=True)
    shown = sample(settings.held_out, seed=7, held_out=True)
    stored = read_safetensors_header(BASE / "model.safetensors").tensor_bytes
    on_event(Prepared(parameter_count(model), stored, train_rows=len(learned), held_out=len(shown)))
    on_event(before := _write("before", model, tokenizer, shown))
    result = train(
        model,
        tokenizer,
        learned,
        measured,
        out=out,
        config=settings.train,
        lora=settings.lora,
        on_event=on_event,
    )
    if result.stopped == "interrupted":
        # A run would be gone on with; a demo is begun again.
        raise KeyboardInterrupt
    on_event(after := _write("after", model, tokenizer, shown))
    rows = text_rows(BASE, measured[: settings.fuse_rows])
    report = fuse(BASE, result.adapter, out / "fused", token_rows=rows)
    on_event(report)
    on_event(fused := _write("fused", load(out / "fused", dtype="float32")[0], tokenizer, shown))
    on_event(exported := _export(result.adapter, out / BUNDLE_NAME, settings.export, after))
    return DemoResult(
        out=out,
        result=result,
        before=before,
        after=after,
        fused=fused,
        report=report,
        exported=exported,
        adapter_bytes=(out / ADAPTER_FILE).stat().st_size,
        seconds=time.monotonic() - begun,
    )


def _write(
    moment: str, model: Phi3ForCausalLM, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Notes:
    begun = time.monotonic()
    notes = tuple(
        generate_note(model, tokenizer, e.conversation, config=GENERATE) for e in examples
    )
    right = sum(_right(facts(e), note) for e, note in zip(examples, notes, strict=True))
    wanted = len(fields(Facts)) * len(examples)
    formed = sum(parse_note(note) is not None for note in notes)
    return Notes(moment, tuple(examples), notes, formed, right, wanted, time.monotonic() - begun)


def _export(adapter: Path, out: Path, config: ExportConfig, adapted: Notes) -> Exported:
    begun = time.monotonic()
    bundle = export(BASE, out, adapters={ADAPTER_NAME: adapter}, config=config)
    first = adapted.examples[0]
    note = rehearse(
        bundle, first.conversation, adapter=ADAPTER_NAME, max_tokens=GENERATE.max_tokens
    )
    return Exported(bundle, note, note == adapted.notes[0], time.monotonic() - begun)


def _right(wanted: Facts, note: str) -> int:
    """How many facts a note has as the conversation said them; none if it is not a note."""
    found = parse_note(note)
    if found is None:
        return 0
    return sum(getattr(found, f.name) == getattr(wanted, f.name) for f in fields(Facts))
