"""Our table of ONNX Runtime's C interface (onnxruntime_abi.h) against its header, as a compiler sees both.

The header comes with an npm package (interface/package.json), since the wheels have none; .ci/run fetches it. What the
installed runtime itself tells is asked wherever there is one.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from lfm2_export.kernels import build, sources

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "build" / "onnxruntime_headers"
OURS = sources.SOURCES / "src" / "onnxruntime_abi.h"
CONSTANTS = {
    "kFloat": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT",
    "kUint8": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8",
    "kInt32": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32",
    "kInt64": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64",
    "kHalf": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16",
    "kAnyType": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED",
    "kRequired": "INPUT_OUTPUT_REQUIRED",
    "kOptional": "INPUT_OUTPUT_OPTIONAL",
    "kFail": "ORT_FAIL",
    "kInvalidArgument": "ORT_INVALID_ARGUMENT",
}

# Both headers in one file, ours in a namespace. Same<A, B>: functions and pointers alike all the way down, integers and
# enumerations of one size, and structures of one name.
_PREAMBLE = """
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include "onnxruntime_c_api.h"
namespace ours {
#include OURS
}
template <typename A> constexpr bool whole = std::is_integral_v<A> || std::is_enum_v<A>;
template <typename A, typename B> struct Same {
  static constexpr bool value = std::is_same_v<A, B> || (whole<A> && whole<B> && sizeof(A) == sizeof(B));
};
template <typename A> struct Same<A, void> { static constexpr bool value = std::is_void_v<A>; };
template <typename B> struct Same<void, B> { static constexpr bool value = std::is_void_v<B>; };
template <> struct Same<void, void> { static constexpr bool value = true; };
template <typename A, typename B> struct Same<A*, B*> {
  static constexpr bool value = std::is_const_v<A> == std::is_const_v<B> &&
                                Same<std::remove_const_t<A>, std::remove_const_t<B>>::value;
};
template <typename A, typename B, typename... As, typename... Bs> struct Same<A(As...), B(Bs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(As) == sizeof...(Bs)) return Same<A, B>::value && (Same<As, Bs>::value && ...);
    return false;
  }();
};
template <typename A, typename B, typename... As, typename... Bs> struct Same<A(As...), B(Bs...) noexcept> {
  static constexpr bool value = Same<A(As...), B(Bs...)>::value;
};
template <typename EntryOf> using Function = decltype(EntryOf::of(nullptr));
"""


def checks(ours: str) -> str:
    """A file that compiles where every entry, member and constant of our header is that of onnxruntime_c_api.h."""
    structures = [*re.findall(r"^struct (\w+);", ours, re.MULTILINE), "OrtApi", "OrtCustomOp"]
    one = "template <> struct Same<ours::{0}, ::{0}> {{ static constexpr bool value = true; }};"
    lines = [one.format(structure) for structure in structures]
    for name, index in entries(ours).items():
        theirs = member(name)
        lines += [
            f'static_assert(offsetof(::OrtApi, {theirs}) / sizeof(void*) == {index}, "index of {name}");',
            f"static_assert(ours::lfm2::ort::{name}::kAt == {index});",
            f"static_assert(Same<Function<ours::lfm2::ort::{name}>, decltype(::OrtApi::{theirs})>::value, "
            f'"signature of {name}");',
        ]
    for structure in ("OrtCustomOp", "OrtApiBase"):
        for name in members(ours, structure):
            where, kind = f"offsetof({{}}::{structure}, {name})", f"decltype({{}}::{structure}::{name})"
            lines += [
                f'static_assert({where.format("ours")} == {where.format("")}, "place of {structure}::{name}");',
                f"static_assert(Same<{kind.format('ours')}, {kind.format('')}>::value, "
                f'"signature of {structure}::{name}");',
            ]
    lines += [f'static_assert(int(ours::lfm2::ort::{k}) == int({v}), "{k}");' for k, v in CONSTANTS.items()]
    return _PREAMBLE + "\n".join(lines)


def entries(ours: str) -> dict[str, int]:
    found = re.findall(r"using (\w+) =\s+Entry<(\d+),", ours)
    assert len(found) == ours.count("= Entry<") + ours.count("=\n    Entry<")
    return {name: int(index) for name, index in found}


def members(ours: str, structure: str) -> list[str]:
    (body,) = re.findall(rf"^struct {structure} {{\n(.*?)^}};", ours, re.MULTILINE | re.DOTALL)
    found = re.findall(r"\(\*(\w+)\)\(|^  uint32_t (\w+);", body, re.MULTILINE)
    assert len(found) == body.count(";")
    return [function or field for function, field in found]


def declared() -> dict[str, str]:
    """The functions of OrtApi by their names without underscores, in lower case: ours have none."""
    body = table_of_functions()
    names = re.findall(r"ORT_API2_STATUS\(\s*(\w+)|ORT_API_CALL\s*\*\s*(\w+)\s*\)", body)
    released = re.findall(r"ORT_CLASS_RELEASE\(\s*(\w+)\s*\)", body)
    found = [a or b for a, b in names] + [f"Release{name}" for name in released]
    return {name.replace("_", "").lower(): name for name in found}


def table_of_functions() -> str:
    theirs = (HEADERS / "onnxruntime_c_api.h").read_text()
    start = theirs.index("struct OrtApi {")
    return theirs[start : theirs.index("\n};", start)]


def member(name: str) -> str:
    return declared()[name.lower()]


needs_header = pytest.mark.skipif(
    not (HEADERS / "onnxruntime_c_api.h").is_file() or build.tools() is None,
    reason="ONNX Runtime's C header (.ci/run fetches it) and a C++ compiler",
)


def compiled(ours: str, folder: Path) -> str:
    """What the compiler says; empty where all is well."""
    header, source = folder / "ours.h", folder / "checks.cpp"
    header.write_text(ours)
    source.write_text(checks(ours))
    tools = build.tools()
    assert tools is not None
    command = [tools.compiler, "-std=c++20", "-fsyntax-only", "-w", f"-I{HEADERS}", f'-DOURS="{header}"', str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr


@needs_header
def test_every_index_and_signature_is_the_headers(tmp_path: Path) -> None:
    ours = OURS.read_text()
    assert compiled(ours, tmp_path) == ""
    print(f"{len(entries(ours))} entries, {len(members(ours, 'OrtCustomOp'))} members of OrtCustomOp are the header's")


@needs_header
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("Entry<99, ", "Entry<98, ", "index of ReleaseTensorTypeAndShapeInfo"),
        ("int* is_constant, ", "size_t* is_constant, ", "signature of KernelInfoGetConstantInputTensor"),
        ("KernelInfoGetAttributeFloat = Entry<85, OrtStatus*(const OrtKernelInfo*",
         "KernelInfoGetAttributeFloat = Entry<85, OrtStatus*(const OrtKernelContext*",
         "signature of KernelInfoGetAttributeFloat"),
        ("  void (*KernelDestroy)(void* kernel);\n", "", "place of OrtCustomOp::GetInputCharacteristic"),
        ("kInt64 = 7", "kInt64 = 8", "kInt64"),
    ],
)  # fmt: skip
def test_a_wrong_one_is_told(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    ours = OURS.read_text()
    assert right in ours
    assert said in compiled(ours.replace(right, wrong), tmp_path)


@needs_header
def test_all_of_it_is_there_in_the_version_that_is_asked_for() -> None:
    """The header says since when a function has been there."""
    ours, theirs = OURS.read_text(), table_of_functions()
    (asked,) = re.findall(r"kApiVersion = (\d+);", ours)
    since = {}
    for name in entries(ours):
        its = re.search(rf"\((?:ORT_API_CALL\s*\*)?\s*{member(name).removeprefix('Release')}\b", theirs)
        assert its is not None, name
        comment, _, after = theirs[: its.start()].rpartition("*/")
        comment = "" if ";" in after else comment[comment.rindex("/*") :]
        since[name] = max([1, *map(int, re.findall(r"\\since Version 1\.(\d+)", comment))])
    print(since)
    assert max(since.values()) == int(asked)


def test_the_runtimes_that_the_table_is_known_to_fit_are_those_that_are_asked_for() -> None:
    (newest,) = re.findall(r"kNewestRuntime = (\d+);", OURS.read_text())
    (below,) = re.findall(r'"onnxruntime>=1\.\d+\.\d+,<1\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert int(below) == int(newest) + 1, "a newer one: change both once these tests pass with it"


# A runtime of Python's


class Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = [("get_api", ctypes.c_void_p), ("get_version", ctypes.c_void_p)]


class Runtime:
    """A runtime of that version, whose table has functions at the places of the few that are called first."""

    def __init__(
        self, version: bytes | None, *, told: bytes = b"ORT Build Info: none", code: int = 2, table: bool = True
    ):
        ours = entries(OURS.read_text())
        text = ctypes.CFUNCTYPE(ctypes.c_void_p)
        built, named, made = (ctypes.create_string_buffer(one or b"") for one in (told, version, b""))
        self.released: list[int] = []
        functions = {
            "GetBuildInfoString": text(lambda: ctypes.addressof(built)),
            "CreateStatus": ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
                lambda *_: ctypes.addressof(made)
            ),
            "GetErrorCode": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: code),
            "ReleaseStatus": ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.released.append),
        }
        self._table = (ctypes.c_void_p * 300)()
        for name, function in functions.items():
            self._table[ours[name]] = ctypes.cast(function, ctypes.c_void_p)
        address = ctypes.addressof(self._table) if table else None
        api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda _: address)
        tells = text(lambda: None if version is None else ctypes.addressof(named))
        self._kept = functions, api, tells, built, named, made
        self.base = Base(ctypes.cast(api, ctypes.c_void_p), ctypes.cast(tells, ctypes.c_void_p))


def misfit(runtime: Runtime) -> str:
    path = build.onnx_library_path()
    if path is None:
        pytest.skip("a C++ compiler and CMake")
    library = ctypes.CDLL(str(path))
    library.lfm2_onnx_misfit.restype = ctypes.c_char_p
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, ctypes.byref(runtime.base)) is None
    return library.lfm2_onnx_misfit().decode()


@pytest.mark.parametrize("version", [b"1.16.3", b"1.33.0", b"2.31.0", b"a fork", None])
def test_a_runtime_of_another_version_is_not_called(version: bytes | None) -> None:
    runtime = Runtime(version)
    told = "without a version" if version is None else version.decode()
    assert misfit(runtime) == f"ONNX Runtime {told}: these kernels are for 1.17 to 1.32"
    assert runtime.released == []


@pytest.mark.parametrize("wrong", [{"told": b"another text"}, {"code": 1}, {"table": False}])
def test_a_runtime_that_answers_otherwise_is_not_used(wrong: dict) -> None:
    runtime = Runtime(b"1.31.1", **wrong)
    assert misfit(runtime) == "ONNX Runtime 1.31.1: its interface is not that of its version"
    assert len(runtime.released) == ("code" in wrong)
