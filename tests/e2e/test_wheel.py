"""The wheel: its content, and what it does in an environment with nothing but its declared dependencies."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Set
from importlib.metadata import Distribution, distribution
from pathlib import Path

import aiohttp
import pytest
from packaging.requirements import Requirement

from tests.support.daemon import clean_environment

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PARTS = ("notify_server", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Run it to its end and return what it printed. Fails on another exit status than 0."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def required(requirements: list[str], extras: Set[str], seen: set[Requirement]) -> Iterator[Distribution]:
    """The installed distributions that the requirements name here, with those extras, and what these require."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if requirement in seen or (marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras})):
            continue
        seen.add(requirement)
        found = distribution(requirement.name)
        yield found
        yield from required(found.requires or [], requirement.extras, seen)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sources, built in a copy: a build leaves files beside them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, source / part)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`notify-server` in an environment of its own: the wheel installed, the dependencies that it declares linked."""
    bare = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", bare, cwd=bare)
    python = bare / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel),
        cwd=bare,
    )
    (packages,) = bare.glob("lib/python*/site-packages")
    for found in required(PROJECT["dependencies"], set(), set()):
        for top in {Path(file).parts[0] for file in found.files or () if ".." not in Path(file).parts}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
    return bare / "bin" / "notify-server"


def test_the_wheel_holds_every_file_of_the_package_and_passes_check_wheel_contents(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    held = {str(path.relative_to(tmp_path)) for path in (tmp_path / "notify_server").rglob("*") if path.is_file()}
    tracked = run("git", "ls-files", "notify_server", cwd=ROOT).splitlines()
    assert set(tracked) - held == set()
    assert run(sys.executable, "-m", "check_wheel_contents", wheel, cwd=tmp_path) == f"{wheel}: OK\n"


async def test_the_wheel_in_a_bare_environment_gives_a_working_demo(program: Path, tmp_path: Path) -> None:
    assert run(program, "--version", cwd=tmp_path) == f"{PROJECT['version']}\n"
    assert run(program, "config", "check", cwd=tmp_path).endswith("Configuration OK.\n")
    process = await asyncio.create_subprocess_exec(
        *(program, "demo", "--keep", tmp_path / "demo"),
        cwd=tmp_path,
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60), aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as web:
            shown = (await process.stdout.readuntil(b"Ctrl-C stops.")).decode()
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+/ui/login/\S+", shown)
            async with web.get(address) as page:
                assert page.status == 200
                assert "/ui/batches" in await page.text()
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0
