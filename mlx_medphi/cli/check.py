"""`medphi check`: what this machine can do, and what is missing."""

from __future__ import annotations

from mlx_medphi.cli.options import JsonOption
from mlx_medphi.cli.show import examples, print_json
from mlx_medphi.machine import look

__all__ = ["check"]

EXAMPLES = examples("medphi check", "medphi check --json")
MARKS = {"ok": "ok", "note": "note", "missing": "MISSING"}


def check(as_json: JsonOption = False) -> int:
    """Say what this machine can do and what is missing; fails when something is missing."""
    findings = []
    for finding in look():
        findings.append(finding)
        if not as_json:
            print(f"{MARKS[finding.state]:8}{finding.name:16}{finding.text}", flush=True)
    if as_json:
        print_json({"findings": findings})
    return 1 if any(finding.state == "missing" for finding in findings) else 0
