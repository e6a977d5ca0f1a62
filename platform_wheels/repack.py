"""A platform wheel: the pure one's files, a library in its place among them, and tags that say what it is for.

In: the pure wheel, the library. Out: the new wheel, whole or not at all; the same bytes for the same input.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.kernels import shipped, sources

KERNELS = "lfm2_export/kernels"
_PURE = "-py3-none-any.whl"


class NotOurWheelError(Lfm2ExportError):
    """Not the pure wheel of this project."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """``tag``: as in the wheel's name. ``system`` and ``machine``: what ``sys.platform`` and ``platform.machine()``
    say there."""

    tag: str
    system: str
    machine: str


def extract_sources(wheel: Path, into: Path) -> Path:
    """The folder of the kernels' sources, as they are in the wheel.

    Raises:
        NotOurWheelError: it has none.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{KERNELS}/")]
        if not wheel.name.endswith(_PURE) or f"{KERNELS}/CMakeLists.txt" not in names:
            raise NotOurWheelError(f"{wheel}: is not lfm2-export's pure wheel; make it with `make wheels`")
        archive.extractall(into, names)
    return into / KERNELS


def repack(wheel: Path, library: Path, platform: Platform, into: Path) -> Path:
    """The pure ``wheel`` with ``library``, which was compiled from the sources in it, as a wheel for ``platform``.

    Raises:
        NotOurWheelError: the wheel is another, or has a library already.
    """
    with tempfile.TemporaryDirectory() as work:
        digest = sources.digest(extract_sources(wheel, Path(work)))
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    folder = shipped.folder_name(platform.system, platform.machine, digest)
    members[f"{KERNELS}/{shipped.FOLDER}/{folder}/{library.name}"] = library.read_bytes()
    (record,) = (name for name in members if name.endswith(".dist-info/RECORD"))
    info = record.removesuffix("RECORD")
    members[f"{info}WHEEL"] = _for_platform(members[f"{info}WHEEL"].decode(), platform.tag).encode()
    del members[record]
    members[record] = _record(members, record).encode()
    return _write(into / wheel.name.replace(_PURE, f"-py3-none-{platform.tag}.whl"), members)


def _for_platform(text: str, tag: str) -> str:
    """The wheel's own description. A library goes where a system keeps those (``platlib``)."""
    text = re.sub(r"(?m)^Root-Is-Purelib: true$", "Root-Is-Purelib: false", text)
    return re.sub(r"(?m)^Tag: py3-none-any$", f"Tag: py3-none-{tag}", text)


def _record(members: Mapping[str, bytes], own_name: str) -> str:
    lines = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{own_name},,\n"])


def _write(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                member = zipfile.ZipInfo(name)  # of 1980, as of no time
                member.external_attr = 0o100644 << 16
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path
