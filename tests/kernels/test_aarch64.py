"""The phone's instruction set: kernels and runner cross-built for aarch64 and run under qemu.

Needs Debian's g++-aarch64-linux-gnu and qemu-user-static, and executorch's aarch64 wheel, which pip downloads.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from lfm2_export.hashing import cache_folder
from lfm2_export.kernels import build, sources

SYSROOT = "/usr/aarch64-linux-gnu"
PARTS = ("lib", "include", "share")  # of the wheel
CROSS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
}
# What a phone of about 2021, of 2018 and of 2016 has.
PROCESSORS = {"max": "neoni8mm neondot scalar", "cortex-a76": "neondot scalar", "cortex-a72": "scalar"}


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The aarch64 wheel of the executorch that is installed here, unpacked once."""
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static", "cmake") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake")
    version = importlib.metadata.version("executorch").partition("+")[0]
    folder = cache_folder() / "tests" / f"executorch-{version}-aarch64"
    if not folder.exists():
        unpack_wheel(version, folder)
    return folder / "executorch"


def unpack_wheel(version: str, folder: Path) -> None:
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True)
    command = [
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(work)),
        *("--platform", "manylinux_2_28_aarch64", f"executorch=={version}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(work)
        pytest.skip(f"no aarch64 wheel of executorch {version}: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = work.glob("*.whl")
    with zipfile.ZipFile(archive) as members:
        wanted = [name for name in members.namelist() if name.startswith(tuple(f"executorch/{d}/" for d in PARTS))]
        members.extractall(work, wanted)
    archive.unlink()
    work.rename(folder)


def under_qemu(program: Path, *arguments: str, processor: str = "max") -> str:
    command = ["qemu-aarch64-static", "-cpu", processor, "-L", SYSROOT, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def built(wheel: Path) -> Path:
    """The folder of the C++ tests and of the runner, built for aarch64 from the same objects: a minute of a core, kept
    in this user's cache for as long as nothing that goes into it changes."""
    entries = CROSS | {"CMAKE_PREFIX_PATH": str(wheel / "share" / "cmake"), "LFM2_BUILD_RUNNER": "ON"}
    definitions = [f"-D{name}={value}" for name, value in entries.items()]
    programs = {"kernels_test", "operators_test", f"kernels/{build.RUNNER}"}
    folder = cache_folder() / "tests" / f"aarch64-{_digest(definitions)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name("aarch64.lock")):
        if not all((folder / program).is_file() for program in programs):
            for old in folder.parent.glob("aarch64-*"):
                shutil.rmtree(old)
            targets = [Path(program).name for program in sorted(programs)]
            for command in (
                ["cmake", "-S", Path(__file__).parent, "-B", folder, *definitions],
                ["cmake", "--build", folder, "--target", *targets, "--parallel"],
            ):
                subprocess.run(command, check=True, capture_output=True)
    return folder


def _digest(definitions: list[str]) -> str:
    """Of everything that the build reads but the system's own headers."""
    found = hashlib.sha256(f"{sources.digest()}\n{definitions}\n".encode())
    version = ["aarch64-linux-gnu-g++", "--version"]
    found.update(subprocess.run(version, check=True, capture_output=True).stdout)
    here = Path(__file__).parent
    for file in sorted(one for one in here.iterdir() if one.suffix in (".cpp", ".h", ".txt")):
        found.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_processor_takes_its_kernels_and_they_are_right(built: Path, processor: str):
    # The newest runs the kernels of all of them; the others must not meet an instruction that they lack.
    brief = [] if processor == "max" else ["--brief"]
    printed = under_qemu(built / "kernels_test", *brief, processor=processor)
    assert f"\nkernels: {PROCESSORS[processor]}\n0 failures" in printed


def test_the_operators_for_onnx_runtime_run(built: Path):
    assert under_qemu(built / "operators_test").splitlines()[-1] == "0 failures"


def test_the_runner_makes_the_same_tokens_on_both_instruction_sets(built: Path, toy: Path, tmp_path: Path):
    (tmp_path / "ids.txt").write_text("5 17 200 3 3 99 1")
    runner = built / "kernels" / build.RUNNER
    arguments = [str(toy), "--ids", str(tmp_path / "ids.txt"), "--max-new-tokens", "60"]
    here = subprocess.run([build.runner_path(), *arguments], capture_output=True, text=True, check=True).stdout
    assert len(here.split()) > 8
    assert under_qemu(runner, *arguments) == here
    assert under_qemu(runner, *arguments, processor="cortex-a76") == here
