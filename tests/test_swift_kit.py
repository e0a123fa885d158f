"""The Swift sources travel in the wheel, and are a package of their own where they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from typer.main import get_command

from mlx_medphi.cli.main import app
from mlx_medphi.coreml.swift_package import APP, KIT, ORIGIN, swift_files, write_swift_package

ROOT = Path(__file__).resolve().parents[1]
# The first that reads `license = "MIT"`.
SETUPTOOLS = 77
# The build backend leaves no argument of the command as it was.
START = "import os, sys, tarfile; from setuptools import build_meta; out = sys.argv[1]\n"
UNPACK = """
name = build_meta.build_sdist(out)
tarfile.open(f"{out}/{name}").extractall(out, filter="data")
os.chdir(f"{out}/{name.removesuffix('.tar.gz')}")
"""
WHEEL = "build_meta.build_wheel(out)\n"
WAYS = {"wheel": START + WHEEL, "sdist": START + UNPACK + WHEEL}


def swift() -> str:
    """The Swift command; the test is skipped where there is none."""
    found = shutil.which("swift") or shutil.which("swift", path="/opt/swift/usr/bin")
    if found is None:
        pytest.skip("no Swift toolchain, on PATH or in /opt/swift")
    return found


def repository_files() -> list[str]:
    """What a clone would have, without what is only lying around here."""
    line = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.splitlines() if os.path.lexists(ROOT / name)]


def sources(name: str) -> set[str]:
    """The files of a package as the repository has them."""
    inside = {file.removeprefix(f"examples/{name}/") for file in repository_files()}
    inside &= {path for path in inside if (ROOT / "examples" / name / path).is_file()}
    shown = {path for path in inside if not any(p.startswith(".") for p in path.split("/"))}
    return {p for p in shown if p.startswith("Sources/") or p in ("Package.swift", "README.md")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in repository_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target, follow_symlinks=False)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_wheel_holds_the_same_sources_as_the_repository(
    clone: Path, tmp_path: Path, way: str
) -> None:
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools {setuptools.__version__} builds no wheel of this project")
    line = [sys.executable, "-W", "ignore", "-c", WAYS[way], str(tmp_path)]
    done = subprocess.run(line, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    # Base and tokenizer of the demo are most of it.
    assert wheel.stat().st_size < 6_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert not list((tmp_path / "site" / "mlx_medphi").rglob("Tests"))
    for name, options in ((KIT, []), (APP, ["--app"])):
        line = [sys.executable, "-m", "mlx_medphi", "swift-kit", name, *options, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert set(json.loads(done.stdout)["files"]) == sources(name)
        for path in sources(name):
            written = (tmp_path / name / path).read_bytes()
            wanted = (ROOT / "examples" / name / path).read_bytes()
            assert written == wanted + ORIGIN.encode() * (path == "README.md"), path


@pytest.mark.parametrize("name", [KIT, APP])
def test_this_checkout_has_the_same_sources(name: str) -> None:
    assert set(swift_files(name)) == sources(name)


def test_what_is_written_is_a_package_to_swift(tmp_path: Path) -> None:
    command = swift()
    for name in (KIT, APP):
        write_swift_package(tmp_path / name, name)
        line = [command, "package", "--package-path", str(tmp_path / name)]
        line += ["--scratch-path", str(tmp_path / "build" / name), "describe", "--type", "json"]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        told = json.loads(done.stdout)
        assert told["name"] == name
        assert {product["name"] for product in told["products"]} >= (
            {KIT, "medphi-kit"} if name == KIT else {APP}
        )
        assert [t["name"] for t in told["targets"] if t["type"] == "test"] == []


@pytest.mark.parametrize("readme", ["README.md", "examples/MedPhiKit/README.md"])
def test_swift_code_shown_is_code_that_is_compiled(readme: str) -> None:
    compiled = ROOT / "examples" / KIT / "Tests" / "MedPhiKitTests" / "ReadmeTests.swift"
    lines = {line.strip() for line in compiled.read_text(encoding="utf-8").splitlines()}
    text = (ROOT / readme).read_text(encoding="utf-8")
    shown = re.findall(r"^```swift\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert shown
    for block in shown:
        assert [line for line in block.splitlines() if line and line.strip() not in lines] == []


def test_commands_shown_for_swift_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = vars(get_command(app))["commands"]
    for name in (KIT, APP):
        text = (ROOT / "examples" / name / "README.md").read_text(encoding="utf-8")
        for verb in re.findall(r"^medphi ([a-z-]+)", text, flags=re.MULTILINE):
            assert verb in verbs, verb
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
