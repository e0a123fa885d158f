"""`medphi swift-kit`: the whole package or nothing, in a new folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.coreml import swift_package
from mlx_medphi.coreml.swift_package import APP, KIT, swift_files

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("name", "options"), [(KIT, []), (APP, ["--app"])])
def test_the_sources_are_written_byte_for_byte(
    run: Any, tmp_path: Path, name: str, options: list[str]
) -> None:
    done = run("swift-kit", tmp_path / "new" / "kit", *options)
    assert (done.code, done.err) == (0, "")
    written = content(tmp_path / "new" / "kit")
    assert {"Package.swift", "README.md"} < written.keys()
    for path, data in written.items():
        assert data == (EXAMPLES / name / path).read_bytes(), path
    assert done.out.startswith(f"{tmp_path / 'new' / 'kit'}: {name}, {len(written)} files, ")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kit"]


def test_no_tests_and_nothing_that_tools_leave_behind(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swift_package, "ASSETS", tmp_path)
    shutil.copytree(EXAMPLES / KIT, tmp_path / KIT, ignore=shutil.ignore_patterns(".build"))
    wanted = set(swift_files())
    for litter in (".build/debug/a.o", ".swiftpm/x", "Package.resolved", "Sources/.DS_Store"):
        place = tmp_path / KIT / litter
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x", encoding="utf-8")
    assert run("swift-kit", tmp_path / "kit").code == 0
    assert content(tmp_path / "kit").keys() == wanted
    assert {path.split("/")[0] for path in wanted} == {"Package.swift", "README.md", "Sources"}


def test_json_tells_the_files(run: Any, tmp_path: Path) -> None:
    done = run("swift-kit", tmp_path / "kit", "--json")
    told = json.loads(done.out)
    written = content(tmp_path / "kit")
    assert told["path"] == str(tmp_path / "kit") and told["name"] == KIT
    assert set(told["files"]) == written.keys()
    assert told["nbytes"] == sum(map(len, written.values()))


def test_an_empty_folder_is_filled(run: Any, tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    assert run("swift-kit", tmp_path / "kit").code == 0
    assert (tmp_path / "kit" / "Package.swift").is_file()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "here"])
def test_a_place_in_use_is_refused_and_left_alone(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "kit"
    if kind == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine", encoding="utf-8")
    elif kind == "file":
        place.write_text("mine", encoding="utf-8")
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        monkeypatch.chdir(place)
    before = content(tmp_path)
    done = run("swift-kit", "." if kind == "here" else place)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert "give a new" in done.err
    assert content(tmp_path) == before and os.path.lexists(place)


def test_what_fails_on_the_way_leaves_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 3:
            raise OSError(28, "No space left on device", str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy)
    done = run("swift-kit", tmp_path / "kit")
    assert done.code == 1 and "No space left on device" in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_installation_without_the_sources_says_so(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swift_package, "ASSETS", tmp_path)
    # A checkout where links became files that hold the place they point to.
    (tmp_path / KIT).write_text("../../../examples/MedPhiKit", encoding="utf-8")
    done = run("swift-kit", tmp_path / "kit")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "the sources of MedPhiKit are not there" in done.err
    assert not (tmp_path / "kit").exists()


def test_the_app_says_where_its_package_must_be(run: Any, tmp_path: Path) -> None:
    alone = run("swift-kit", tmp_path / APP, "--app").out
    assert f"medphi swift-kit {tmp_path / KIT}" in alone
    assert run("swift-kit", tmp_path / KIT).code == 0
    assert "swift-kit" not in run("swift-kit", tmp_path / "Other", "--app").out
