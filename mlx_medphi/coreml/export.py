"""A Phi-3 as a Core ML bundle: checked, written beside its place, verified there, then named."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.assumed import assumed_weights
from mlx_medphi.coreml.build import write_package
from mlx_medphi.coreml.bundle import SUFFIX, Bundle, open_bundle
from mlx_medphi.coreml.bundle_facts import BundleFacts, source_date
from mlx_medphi.coreml.bundle_tokenizer import template_sha256
from mlx_medphi.coreml.bundle_write import draft_bundle, finish_bundle
from mlx_medphi.coreml.certificate import write_golden
from mlx_medphi.coreml.cost import CostSheet, cost_sheet
from mlx_medphi.coreml.facts import (
    ADAPTER_FOLDER,
    adapter_entries,
    function_facts,
    package_text,
    quantization_facts,
    verification_facts,
)
from mlx_medphi.coreml.golden import Golden, make_golden, make_prompts
from mlx_medphi.coreml.manifest import PACKAGE
from mlx_medphi.coreml.manifest_program import Memory
from mlx_medphi.coreml.package import WEIGHT_FILE
from mlx_medphi.coreml.parity import CaseResult, against
from mlx_medphi.coreml.program import Plan
from mlx_medphi.coreml.request import Request, check_place, check_space, make_request
from mlx_medphi.coreml.slot_file import PackFacts, make_pack, pack_path, write_pack
from mlx_medphi.coreml.slots import AdapterBase, layer_factors
from mlx_medphi.coreml.sources import (
    Prepared,
    original_model,
    prepare,
    reference_model,
    staged_forms,
)
from mlx_medphi.coreml.verify import Level, check_bundle, check_level, failed
from mlx_medphi.coreml.weights import plan_weights
from mlx_medphi.errors import ExportError, MedPhiError
from mlx_medphi.files import atomic_directory, sha256_file
from mlx_medphi.model.adapter import load_adapter
from mlx_medphi.model.weights import Checkpoint

__all__ = ["ExportPlan", "export", "plan_export"]

Adapters = Mapping[str, str | Path] | Iterable[str | Path]
Progress = Callable[[str, int, int], None]

STAGING = ".staging"
# Golden logits of one adapter: more than any prompts ask for.
LOGIT_ROWS = 40
# Codes carried over this closely, as a share of a group's largest value, are the base's own.
EXACT = 1e-3
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write, before it does.

    Attributes:
        base: what is exported.
        config: the settings, all resolved.
        slot_rank: rank of the slots; None without slots.
        adapters: their names.
        cost: the cost sheet.
        needed_bytes: room on disk while it is made.
        notes: what the user should know, one line each.
    """

    base: str
    config: ExportConfig
    slot_rank: int | None
    adapters: tuple[str, ...]
    cost: CostSheet
    needed_bytes: int
    notes: tuple[str, ...]


def plan_export(
    base: str | Path,
    out: str | Path | None = None,
    *,
    adapters: Adapters = (),
    config: ExportConfig = ExportConfig(),
    replace: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> ExportPlan:
    """Check an export and tell what it costs; nothing is written.

    Where the base is still to be quantised, sizes are those of the usual form. The place and its
    room are checked where `out` names one; all else is as of `export`.

    Raises:
        MedPhiError: as `export`.
    """
    request = make_request(base, adapters, config, revision=revision, offline=offline)
    target = None if out is None else _place(request, out, replace)
    cost = _cost(_plan(request, request.checkpoint, assumed=True), request)
    if target is not None:
        check_space(target, _needed(request, cost))
    return ExportPlan(
        base=request.base.name,
        config=request.config,
        slot_rank=request.rank,
        adapters=tuple(request.adapters),
        cost=cost,
        needed_bytes=_needed(request, cost),
        notes=request.notes,
    )


def export(
    base: str | Path,
    out: str | Path,
    *,
    adapters: Adapters = (),
    config: ExportConfig = ExportConfig(),
    level: Level = "graph",
    replace: bool = False,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write a model as a Core ML bundle that a Swift app loads.

    The bundle is written beside `out`, read back and verified there, and only then gets its name.

    Args:
        base: a checkpoint directory, a single-file model, or a hub id; plain or quantised by MLX.
        out: the bundle, a name ending in .medphi.
        adapters: name -> file or directory; or files or directories, named after themselves.
        config: the settings.
        level: how far it is verified: "graph" runs the saved program against MLX, "spec" checks it
            without running it, "predict" also runs Core ML (on a Mac).
        replace: whether an older bundle at `out` is replaced, once the new one is verified.
        revision: branch, tag or commit of a hub id.
        offline: never use the network.
        progress: called with (what is done, steps done, steps in all).

    Returns:
        The bundle.

    Raises:
        ExportError: settings the model cannot have, `out` in the way, or no room on the disk.
        AdapterError: an adapter is damaged or does not fit.
        UsageError: adapters and mode do not go together, or a level that this machine cannot reach.
        ParityError: the package is not the model within the limits; nothing is left at `out`.
        CheckpointError, TokenizerError, HubError, FuseError: the base or the fusing failed.
    """
    check_level(level)
    request = make_request(base, adapters, config, revision=revision, offline=offline)
    target = _place(request, out, replace)
    plan = _plan(request, request.checkpoint, assumed=True)
    check_space(target, _needed(request, _cost(plan, request)))
    try:
        with atomic_directory(target, replace=replace) as draft:
            _write(request, plan, draft, target.stem, level, progress)
    except (OSError, MedPhiError) as exc:
        why = exc if isinstance(exc, OSError) else exc.__cause__
        # What a room says of a full disk names a folder that is gone by now.
        if not isinstance(why, OSError) or (why is not exc and why.errno not in DISK_ERRORS):
            raise
        raise ExportError(
            f"{target}: cannot be written ({why.strerror or why}); what was there is unchanged"
        ) from exc
    return open_bundle(target, check=False)


def _place(request: Request, out: str | Path, replace: bool) -> Path:
    sources = [request.checkpoint.path, *request.sources.values()]
    return check_place(Path(out).expanduser(), sources, replace)


def _plan(request: Request, checkpoint: Checkpoint, *, assumed: bool = False) -> Plan:
    """What the program is built from."""
    forms = staged_forms(request) if assumed else {}
    weights = (
        assumed_weights(checkpoint, request.config, forms)
        if forms
        else plan_weights(checkpoint, request.config)
    )
    factors = {}
    if request.config.adapters == "functions":
        factors = {
            name: {layer: layer_factors(adapter, layer) for layer in adapter.layers}
            for name, adapter in request.adapters.items()
        }
    return Plan(
        config=checkpoint.config,
        export=request.config,
        context=request.context,
        weights=weights,
        slot_rank=request.rank,
        factors=factors,
    )


def _cost(plan: Plan, request: Request, package_bytes: int | None = None) -> CostSheet:
    return cost_sheet(
        plan.config,
        plan.weights,
        plan.export,
        context=plan.context,
        slot_rank=plan.slot_rank,
        factors=request.adapters if request.config.adapters == "functions" else None,
        package_bytes=package_bytes,
    )


def _needed(request: Request, cost: CostSheet) -> int:
    """Bytes on disk at the largest moment: the package, packs, and checkpoints on the way."""
    text = sum(file.stat().st_size for file in request.tokenizer.files.values())
    logits = LOGIT_ROWS * request.checkpoint.config.vocab_size * 4 * (1 + len(request.adapters))
    needed = cost.package_bytes + len(request.adapters) * cost.adapter + text + logits
    if request.config.adapters == "fused":
        needed += max(request.checkpoint.nbytes, cost.package_bytes)
    return needed + (cost.package_bytes if request.quantizes else 0)


def _write(
    request: Request, plan: Plan, draft: Path, name: str, level: Level, progress: Progress | None
) -> None:
    """Fill `draft` with a whole, verified bundle; `plan` holds where nothing has to be made."""
    # First what takes no time and may be refused.
    date = source_date()
    if request.rank is not None:
        _write_packs(request, draft)
    staging = draft / STAGING
    staging.mkdir()
    prepared = prepare(request, staging, progress)
    if prepared.checkpoint is not request.checkpoint:
        plan = _plan(request, prepared.checkpoint)
    package = draft / PACKAGE
    write_package(plan, package_text(request, plan.weights), package, progress)
    golden, fidelity = Golden(()), tuple[CaseResult, ...]()
    if level != "spec":
        golden, fidelity = _ask_mlx(request, prepared, plan, package, progress)
    write_golden(draft, golden)
    shutil.rmtree(staging)
    facts = changed(_facts(request, prepared, plan, draft, name), date=date)
    report = check_bundle(draft_bundle(draft, facts), golden, level, progress=progress)
    if not report.passed:
        raise failed(Path(f"{name}{SUFFIX}"), report, "; nothing was written")
    finish_bundle(draft, changed(facts, verification=verification_facts(report, fidelity)))


def _write_packs(request: Request, draft: Path) -> None:
    facts = PackFacts(
        base_id=request.base.name,
        tokenizer_sha256=sha256_file(request.tokenizer.files["tokenizer.json"]),
        chat_template_sha256=template_sha256(request.tokenizer),
    )
    target = AdapterBase(request.checkpoint.config, request.base.fingerprint, request.on_load)
    folder = draft / ADAPTER_FOLDER
    folder.mkdir(exist_ok=True)
    for name, adapter in request.adapters.items():
        pack = make_pack(name, adapter, target, request.rank or 0, facts)
        write_pack(pack_path(folder, name), pack)


def _ask_mlx(
    request: Request, prepared: Prepared, plan: Plan, package: Path, progress: Progress | None
) -> tuple[Golden, tuple[CaseResult, ...]]:
    """Golden logits, and how far the exported weights are from those that were trained on."""
    fused = request.config.adapters == "fused"
    adapters = {} if fused else dict(request.sources)
    parameters = sum(math.prod(w.shape) for w in plan.weights.layers.values())
    prompts = make_prompts(request.tokenizer, plan.context, request.config.prefill, parameters)
    model = reference_model(prepared, plan, package / WEIGHT_FILE)
    golden = make_golden(
        model,
        prompts,
        adapters,
        progress=None if progress is None else lambda *n: progress("golden", *n),
    )
    del model  # before another is loaded
    if not prepared.made and (plan.weights.worst_error or 0.0) <= EXACT:
        return golden, ()
    original = original_model(request)
    if fused:
        load_adapter(original, *request.sources.values(), allow_other_base=True)
    return golden, against(original, golden, adapters)


def _facts(request: Request, prepared: Prepared, plan: Plan, draft: Path, name: str) -> BundleFacts:
    files = [file for file in (draft / PACKAGE).rglob("*") if file.is_file()]
    cost = _cost(plan, request, sum(file.stat().st_size for file in files))
    return BundleFacts(
        name=name,
        config=plan.config,
        export=request.config,
        context=plan.context,
        base=request.base,
        tokenizer=request.tokenizer,
        functions=function_facts(plan),
        quantization=quantization_facts(plan.weights, request, prepared),
        memory=Memory(
            weights=plan.blobs.nbytes,
            kv_per_token=cost.kv_per_token,
            kv=cost.kv,
            adapter_slots=cost.adapter if plan.slot_rank is not None else 0,
            resident=cost.resident,
        ),
        adapters=adapter_entries(request, draft),
        slot_rank=plan.slot_rank,
        cost=cost.to_dict(),
    )
