"""``python -m lfm2_export.kernels`` builds the operator library and the native runner, and prints where they are."""

import sys

from lfm2_export.errors import Lfm2ExportError
from lfm2_export.kernels import build

if __name__ == "__main__":
    try:
        print(build.library_path())
        print(build.runner_path())
    except Lfm2ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
