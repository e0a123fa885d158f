"""Say how much of the Swift sources their tests reach, and fail below the limit for Phi3Core.

    python tests/swift_coverage.py REPORT SOURCES

REPORT is the JSON file that `swift test --enable-code-coverage` writes; `make swift-coverage` knows
where.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Lines of this target that its tests must reach, in per cent.
TARGET, LIMIT = "Phi3Core", 85.0


def lines_reached(report: Path, sources: Path) -> dict[str, tuple[int, int]]:
    """Lines reached and lines there are, for each target under `sources`."""
    (data,) = json.loads(report.read_text(encoding="utf-8"))["data"]
    found: dict[str, tuple[int, int]] = {}
    for file in data["files"]:
        path = Path(file["filename"])
        if sources.resolve() in path.parents:
            target = path.relative_to(sources.resolve()).parts[0]
            reached, there = found.get(target, (0, 0))
            lines = file["summary"]["lines"]
            found[target] = (reached + lines["covered"], there + lines["count"])
    return dict(sorted(found.items()))


def main(report: Path, sources: Path) -> int:
    found = lines_reached(report, sources)
    for target, (reached, there) in found.items():
        sys.stdout.write(f"{target:20}{reached / there:7.1%} of {there:,} lines\n")
    reached, there = found.get(TARGET, (0, 1))
    if reached / there * 100 >= LIMIT:
        return 0
    sys.stderr.write(f"error: less than {LIMIT:.0f}% of {TARGET} is tested\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
