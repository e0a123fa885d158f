"""A MIL program as a `.mlpackage`: the same inputs give the same bytes.

coremltools writes the program; the weight file is written by `blobs.py`, because its layout is
known before any weight is read, and a weight then goes to its place as it is read. Letting
coremltools write zeros to be filled in later would write every byte twice, and handing it the real
numbers would hold them unpacked. What coremltools makes at random, ids and dates, is made from the
contents here.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_medphi.coreml.blobs import BlobPlan
from mlx_medphi.coreml.library import coremltools

__all__ = ["MODEL_FILE", "SPEC_VERSION", "WEIGHT_FILE", "PackageText", "describe", "write_program"]

SPEC_VERSION = 9
"""Core ML's format of iOS 18 and macOS 15, the first with states and several functions."""

DATA = "Data/com.apple.CoreML"
MODEL_FILE = f"{DATA}/model.mlmodel"
WEIGHT_FILE = f"{DATA}/weights/weight.bin"
# How a program names the file, wherever the package lies.
WEIGHT_REFERENCE = "@model_path/weights/weight.bin"
AUTHOR = "com.apple.CoreML"
# Names ids that are made from contents.
NAMESPACE = uuid.UUID("5a1f0f1c-7d0e-5c0b-9d7c-6d6564706869")


@dataclass(frozen=True)
class PackageText:
    """What a package says about itself: to Xcode's model view and to whoever opens it.

    Attributes:
        description: one paragraph.
        author: who made it; may be empty.
        licence: terms of the weights; may be empty.
        version: version of the model.
        facts: further keys and values.
    """

    description: str
    author: str = ""
    licence: str = ""
    version: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def describe(program: Any, blobs: BlobPlan, text: PackageText, features: Mapping[str, str]) -> Any:
    """The protobuf of a program whose constants lie where `blobs` says.

    Args:
        program: a MIL Program whose large constants carry the ids of `blobs`.
        blobs: the layout of the weight file.
        text: what the package says about itself.
        features: input, state or output name -> its description.

    Returns:
        A Core ML Model message.
    """
    load = coremltools("converters.mil.backend.mil.load")
    mil = _exporter(load)(program, blobs).export()
    exporter = load.CoreMLProtoExporter(
        program,
        mil,
        predicted_feature_name=None,
        predicted_probabilities_name=None,
        classifier_config=None,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=SPEC_VERSION,
    )
    model = exporter.export(SPEC_VERSION)
    for function in model.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = features[feature.name]
    metadata = model.description.metadata
    metadata.shortDescription, metadata.author = text.description, text.author
    metadata.license, metadata.versionString = text.licence, text.version
    made_by = {"com.github.apple.coremltools.version": coremltools().__version__}
    for key, value in sorted({**text.facts, **made_by}.items()):
        metadata.userDefined[key] = value
    return model


def _exporter(load: Any) -> Any:
    """coremltools' exporter with our weight file in place of its own."""
    helper = coremltools("converters.mil.backend.mil.helper")

    class Exporter(load.MILProtoExporter):  # type: ignore[misc]  # coremltools has no types
        def __init__(self, program: Any, blobs: BlobPlan) -> None:
            super().__init__(program, weights_dir="", specification_version=SPEC_VERSION)
            self.blobs = blobs

        def get_milproto_value(self, var: Any) -> Any:
            if var.op.weight_id is None:
                return helper.create_immediate_value(var)
            return helper.create_file_value_tensor(
                file_name=WEIGHT_REFERENCE,
                offset=self.blobs.offsets[var.op.weight_id],
                dim=var.shape,
                data_type=helper.types_to_proto_primitive(var.sym_type.get_primitive()),
            )

    return Exporter


def write_program(model: Any, package: Path) -> None:
    """Write everything of a package but the weight file, in an order that never changes."""
    path = package / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    (package / WEIGHT_FILE).parent.mkdir(exist_ok=True)
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    content = hashlib.sha256(data).hexdigest()
    root, weights = (
        str(uuid.uuid5(NAMESPACE, f"{content} {item}")).upper() for item in ("model", "weights")
    )
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            root: {
                "author": AUTHOR,
                "description": "CoreML Model Specification",
                "name": "model.mlmodel",
                "path": f"{AUTHOR}/model.mlmodel",
            },
            weights: {
                "author": AUTHOR,
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": f"{AUTHOR}/weights",
            },
        },
        "rootModelIdentifier": root,
    }
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (package / "Manifest.json").write_text(text, encoding="utf-8")
