"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_medphi.blas import load_blas

SHARED_VARIABLE = "MEDPHI_SHARED"
# Settings of the person who runs the tests must not change what they see.
SCRUBBED = ("HF_", "HUGGING", "TRANSFORMERS_", "MLX_", "COLUMNS", "FORCE_COLOR", "NO_COLOR")


# Here and not in a hook: the conftest files of the folders below are read next and import MLX.
for name in [name for name in os.environ if name.startswith(SCRUBBED)]:
    del os.environ[name]
# The products of the tests are too small to be shared by threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
load_blas()


def shared_folder(*parts: str) -> Path:
    """A folder of the material beside the checkout; the test is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get(SHARED_VARIABLE) or default).joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; point {SHARED_VARIABLE} at the folder that has it")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with mts-dialog, primock57 and aci-bench as published."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def shared_tokenizer() -> Path:
    """The folder with Phi-3-mini's own tokenizer files and vectors."""
    return shared_folder("tokenizer", "phi-3-mini")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The folder with small checkpoints and transformers' outputs for them."""
    return shared_folder("reference", "phi3")
