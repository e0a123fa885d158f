"""The pinned packages are plain, complete and within what pyproject.toml asks for."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(
    r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; (python_version|sys_platform) (==|>=|<) "[a-z0-9.]+")?'
)


def pins() -> list[str]:
    lines = (ROOT / "tests" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def asked(section: str) -> list[Requirement]:
    # tomllib is not in Python 3.10; the lists are plain enough to be read without it.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split(f"\n{section} = [", 1)[1].split("]\n", 1)[0]
    return [Requirement(item) for item in re.findall(r'^\s+"(.+)",$', block, flags=re.MULTILINE)]


def test_every_line_is_a_name_and_a_version() -> None:
    assert [line for line in pins() if not PIN.fullmatch(line)] == []
    assert pins() == sorted(pins(), key=lambda line: line.split("==")[0])


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned: dict[str, list[str]] = {}
    for line in pins():
        name, version = line.split(" ; ")[0].split("==")
        pinned.setdefault(name, []).append(version)
    for requirement in asked("dependencies") + asked("dev"):
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is not pinned"
        assert all(version in requirement.specifier for version in versions), requirement
