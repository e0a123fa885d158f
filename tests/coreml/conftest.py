"""Small models that were exported once, for all tests that only run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference_cases import (
    ADAPTERS,
    MINI,
    Export,
    Exported,
    checkpoint_of,
    settings,
    write_base,
    write_bundle,
)

from mlx_medphi.config import ExportConfig


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Makes the package of a reference checkpoint; the same settings give the same one."""
    made: dict[tuple[str, ExportConfig], Exported] = {}

    def make(name: str, **changes: Any) -> Exported:
        key = (name, settings(**changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            made[key] = write_base(checkpoint_of(name), folder / "Phi3.mlpackage", key[1])
        return made[key]

    return make


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Makes a bundle of mini-4k with the adapters `lora` and `rslora` in one of the forms."""
    made: dict[tuple[str | None, ExportConfig], Exported] = {}

    def make(form: str, *, only: str | None = None, **changes: Any) -> Exported:
        key = (only, settings(adapters=form, **changes))
        if key not in made:
            out: Path = tmp_path_factory.mktemp(form) / "notes.medphi"
            given = ADAPTERS if only is None else {only: ADAPTERS[only]}
            made[key] = write_bundle(MINI, out, key[1], given)
        return made[key]

    return make
