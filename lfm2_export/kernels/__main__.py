"""``python -m lfm2_export.kernels`` builds the operator libraries and the native runner, and prints where they are.

What is for ExecuTorch is left out where it is not installed.
"""

import importlib.util
import sys

from lfm2_export.console import logging_to_stderr
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.kernels import build


def main() -> int:
    try:
        with logging_to_stderr(verbose=False):
            _build_and_print()
    except Lfm2ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build_and_print() -> None:
    library = build.onnx_library_path()
    if library is None:
        raise build.KernelBuildError(build.missing_tools(build.ONNX_LIBRARY))
    print(library)
    if importlib.util.find_spec("executorch") is not None:
        print(build.library_path())
        print(build.runner_path())


if __name__ == "__main__":
    sys.exit(main())
