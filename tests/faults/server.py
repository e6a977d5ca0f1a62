"""Makes processes that are ready at once: one that has imported and used everything, and forks for each request.

In: a JSON object per line (``forks.Request``). Out: one per line, with the process's exit code. ``python -m
tests.faults.server`` is started by ``forks.Forks`` only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from tests.faults import inject

inject.use_python_io()

import torch  # noqa: E402

from lfm2_export import cli  # noqa: E402
from tests.faults import ready  # noqa: E402

SECONDS = 240  # of one process


def child(request: dict[str, Any]) -> int:
    for number, place in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['notes']}/{place}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(SECONDS)
    injector = None
    if request["fault"] is not None:
        injector = inject.Injector(inject.Fault(**request["fault"]), request["root"])
        injector.install()
    sys.argv = ["-c", *request["arguments"]]
    code = 0
    if request["code"]:
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
    else:
        code = cli.main(request["arguments"])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if injector is not None:
        number = os.open(f"{request['notes']}/count", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(number, str(injector.count).encode())
    return code


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # One thread and one core, so that the pieces of a file come in one order. The cache is the parent's to remove.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = sys.argv[1]
    ready.warm_up()
    answers.write("ready\n")
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 70
            try:
                code = child(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(code)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")


if __name__ == "__main__":
    main()
