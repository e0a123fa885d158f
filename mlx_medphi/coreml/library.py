"""coremltools, imported when it is needed and without what it says on a machine that is no Mac."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from types import ModuleType

__all__ = ["coremltools"]


def coremltools(module: str = "") -> ModuleType:
    """coremltools, or one of its modules such as "proto.Model_pb2".

    Importing it takes two seconds, and off a Mac it complains about eight parts it cannot load.
    """
    name = f"coremltools.{module}" if module else "coremltools"
    with _quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
