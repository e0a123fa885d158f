"""`medphi swift-kit`: the whole package or nothing, in a new folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

import mlx_medphi as mp
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
    origin = f"\nWritten by `medphi swift-kit` of mlx_medphi {mp.__version__}.\n".encode()
    for path, data in written.items():
        wanted = (EXAMPLES / name / path).read_bytes()
        assert data == wanted + origin * (path == "README.md"), path
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


@pytest.mark.parametrize("kind", ["right", "file", "below a file", "link"])
def test_a_parent_that_cannot_be_written_is_named_with_the_reason(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    parent = tmp_path / "parent"
    reason = f"{parent} is a file"
    if kind == "right":
        # As the system does it, which the superuser would not see.
        def refuse(prefix: str, suffix: str, dir: Path) -> str:
            raise PermissionError(13, "Permission denied", f"{dir}/{prefix}x{suffix}")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        reason = "Permission denied"
    elif kind == "link":
        parent.symlink_to(tmp_path / "nowhere" / "at" / "all")
        (tmp_path / "nowhere").write_text("mine", encoding="utf-8")
        reason = f"{parent} is a link to nothing"
    else:
        parent.write_text("mine", encoding="utf-8")
    place = parent / "deep" / "kit" if kind == "below a file" else parent / "kit"
    done = run("swift-kit", place)
    assert done.code == 1 and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith(f"error: {place}: cannot be written in {place.parent} ({reason})")
    assert "give another folder" in done.err and ".tmp" not in done.err


def test_a_parent_that_is_not_there_is_made(run: Any, tmp_path: Path) -> None:
    assert run("swift-kit", tmp_path / "a" / "b" / "kit").code == 0
    assert (tmp_path / "a" / "b" / "kit" / "Package.swift").is_file()


@pytest.mark.parametrize(("options", "more"), [([], ["-c", "release", "--product", "medphi-kit"]),
                                               (["--app"], [])])  # fmt: skip
def test_commands_shown_can_be_pasted(
    run: Any, tmp_path: Path, options: list[str], more: list[str]
) -> None:
    place = tmp_path / "My App's $(x) `y`" / "kit"
    done = run("swift-kit", place, *options)
    line = next(line for line in done.out.splitlines() if "swift build" in line)
    words = shlex.split(line[line.index("swift build") :])
    assert words == ["swift", "build", "--package-path", str(place), *more]
    for shown in (line for line in done.out.splitlines() if "medphi swift-kit" in line):
        words = shlex.split(shown[shown.index("medphi swift-kit") :])
        assert words == ["medphi", "swift-kit", str(place.parent / KIT)]


def old_package(place: Path, name: str) -> None:
    """What an older version wrote, and a build left behind."""
    (place / "Sources" / "Old").mkdir(parents=True)
    (place / ".build").mkdir()
    for path in ("Sources/Old/Old.swift", ".build/x", "Package.resolved", "README.md"):
        (place / path).write_text("old", encoding="utf-8")
    manifest = f'import PackageDescription\n\nlet package = Package(\n    name: "{name}",\n)\n'
    (place / "Package.swift").write_text(manifest, encoding="utf-8")


@pytest.mark.parametrize(("name", "options"), [(KIT, []), (APP, ["--app"])])
def test_a_package_is_replaced_when_that_is_asked_for(
    run: Any, tmp_path: Path, name: str, options: list[str]
) -> None:
    place = tmp_path / "kit"
    old_package(place, name)
    before = content(place)
    done = run("swift-kit", place, *options)
    assert done.code == 2 and "or replace the package with --replace" in done.err
    assert content(place) == before
    assert run("swift-kit", place, *options, "--replace").code == 0
    assert content(place).keys() == set(swift_files(name))
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    # What was written is itself replaced.
    assert run("swift-kit", place, *options, "--replace").code == 0
    assert content(place).keys() == set(swift_files(name))


@pytest.mark.parametrize("kind", ["other", "client", "no manifest", "app", "tests", "file", "link"])
def test_nothing_else_is_replaced(run: Any, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "kit"
    old_package(place, {"other": "MedPhiKitX", "app": APP}.get(kind, KIT))
    if kind == "client":
        text = '// MedPhiKit\nlet package = Package(\n    name: "Mine",\n    dependencies: [\n'
        text += '        .product(name: "MedPhiKit", package: "MedPhiKit"),\n    ])\n'
        (place / "Package.swift").write_text(text, encoding="utf-8")
    elif kind == "no manifest":
        (place / "Package.swift").unlink()
    elif kind == "tests":
        (place / "Tests").mkdir()
        (place / "Tests" / "Mine.swift").write_text("mine", encoding="utf-8")
    elif kind in ("file", "link"):
        shutil.rmtree(place)
        place.write_text("mine") if kind == "file" else place.symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    done = run("swift-kit", place, "--replace")
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert str(place) in done.err and "give a new" in done.err
    assert ("holds more than MedPhiKit: Tests" in done.err) == (kind == "tests")
    assert content(tmp_path) == before and os.path.lexists(place)


def test_the_old_package_stays_when_the_new_one_fails(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kit"
    old_package(place, KIT)
    before = content(tmp_path)

    def copy(source: Path, target: Path) -> None:
        if target.name == "README.md":
            raise OSError(28, "No space left on device", str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy)
    done = run("swift-kit", place, "--replace")
    assert done.code == 1 and f"{place}: cannot be written in {tmp_path} (No space left" in done.err
    assert content(tmp_path) == before


def test_the_folder_a_shell_is_in_is_not_replaced(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kit"
    old_package(place, KIT)
    before = content(place)
    for here in (place, place / "Sources"):
        monkeypatch.chdir(here)
        done = run("swift-kit", place, "--replace")
        assert done.code == 2 and "the folder this command runs in" in done.err
        assert content(place) == before
