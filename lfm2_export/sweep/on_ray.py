"""Tasks on Ray: of this machine alone, or of a cluster. The only file that imports ray.

In: tasks. Out: how they ended. A Ray of our own listens on this machine's loopback address only and to nobody without
its token, sends nothing home, has no dashboard, prints nothing, and leaves no files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm2_export import interrupts
from lfm2_export.errors import ConfigError, Lfm2ExportError, ResourceError
from lfm2_export.messages import shown_reason
from lfm2_export.resources import human_bytes
from lfm2_export.sweep import work
from lfm2_export.sweep.schedule import Ended, Step, Task

# Read when ray is imported, and by its processes.
_TELEMETRY = {"RAY_usage_stats_enabled": "0"}
os.environ.update(_TELEMETRY)

import ray  # noqa: E402
import ray.exceptions  # noqa: E402
from ray._private import ray_constants, services  # noqa: E402

# Little is sent: plans out, records back. Ray takes no less; where /dev/shm is smaller, as in containers, it uses /tmp.
_OBJECT_STORE = 80 << 20
# After so many tasks a worker's process ends: what libraries keep is given back.
_MOST_CALLS = 8
_POLL_S = 1.0
# For Ray's seven processes to come up on a machine that has other work as well; its own limits are 30, 60 and 100 s.
_START_S = 300
_PATIENCE = {
    "RAY_worker_register_timeout_seconds": str(_START_S),
    "RAY_agent_register_timeout_ms": str(1000 * _START_S),
}
# Of every Ray that this process starts, which asks for one where the mode is not set: without ours it would keep one in
# the home folder. It is read once.
_TOKEN = secrets.token_hex(32)
# A unix socket's path has 107 characters, of which Ray's own names below its folder take 80.
_LONGEST_FOLDER = 24


@ray.remote(max_retries=0, max_calls=_MOST_CALLS)
def _done(task: Task) -> str | None:
    """The one line of what went wrong."""
    return (work.export_cell if task.step is Step.EXPORT else work.measure_cell)(task.job).error


class RayWorkers:
    """The workers of the Ray that this process is connected to."""

    def __init__(self) -> None:
        self._running: dict[Any, Task] = {}

    def refusal(self, task: Task) -> str | None:
        """Ray would wait for ever for a machine that is large enough."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(_fits(task, node) for node in nodes):
            return None
        cores = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        most = max((int(node.get("memory", 0)) for node in nodes), default=0)
        return (
            f"needs {task.job.threads} threads and {human_bytes(task.memory)} of memory; the largest machine has "
            f"{cores} and {human_bytes(most)}"
        )

    def start(self, task: Task) -> None:
        options = _done.options(num_cpus=task.job.threads, memory=task.memory, name=str(task))
        self._running[options.remote(task)] = task

    def wait(self) -> Ended:
        while True:
            interrupts.check()
            done, _ = ray.wait(list(self._running), timeout=_POLL_S)
            if done:
                return self._ended(done[0])

    def _ended(self, reference: Any) -> Ended:
        task = self._running.pop(reference)
        try:
            return Ended(task=task, error=ray.get(reference))
        except ray.exceptions.OutOfMemoryError:
            return Ended(task=task, error="its worker was ended, as the machine ran out of memory", lost=True)
        except ray.exceptions.RayTaskError as error:  # what only a broken installation raises, outside of the work
            return Ended(task=task, error=f"its worker failed ({shown_reason(error.cause or error)})", lost=True)
        except ray.exceptions.RayError as error:
            return Ended(task=task, error=f"its worker died ({type(error).__name__})", lost=True)

    def cancel(self) -> None:
        """Ends what is running."""
        for reference in self._running:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)


def _fits(task: Task, node: Mapping[str, float]) -> bool:
    return node.get("CPU", 0) >= task.job.threads and node.get("memory", 0) >= task.memory


@contextlib.contextmanager
def local(*, workers: int, threads: int) -> Iterator[RayWorkers]:
    """A Ray of this process's own, for ``workers`` tasks of ``threads`` at a time; or the one that it is connected to
    already, as in a program of Ray's.

    Raises:
        ResourceError: it cannot be started here.
    """
    folder = _short_folder()
    own = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": _TOKEN, **_TELEMETRY, **_PATIENCE}
    try:
        with _environment(own), _on_loopback(), _patiently():
            settings = {
                "num_cpus": workers * threads,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE,
                "_temp_dir": str(folder),
            }
            with _connected("local", settings) as found:
                yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(address: str) -> Iterator[RayWorkers]:
    """The workers of a cluster that is there.

    Raises:
        ConfigError: nobody answers at the address, or not in this version of Ray's.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: Ray's client is not used; give the command on one of the cluster's machines, with "
            "--address auto"
        )
    with _connected(address, {}) as found:
        yield found


@contextlib.contextmanager
def _connected(address: str, settings: Mapping[str, Any]) -> Iterator[RayWorkers]:
    found = RayWorkers()
    if is_ours := not ray.is_initialized():
        _start(address, settings)
    try:
        yield found
    finally:
        found.cancel()
        if is_ours:
            ray.shutdown()


def _start(address: str, settings: Mapping[str, Any]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **settings)
    except Exception as error:  # whatever Ray, its processes and its network raise
        ray.shutdown()
        interrupts.check()
        raise _unusable(address, error) from error
    # It says on stderr, in colour, of each worker that dies what Ended says.
    ray._private.worker._worker_logs_enabled = False
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _unusable(address: str, error: Exception) -> Lfm2ExportError:
    if address == "local":
        return ResourceError(
            f"Ray: cannot be started on this machine ({shown_reason(error)}); free cores, memory and room in /tmp"
        )
    return Lfm2ExportError(
        f"Ray: nothing can be used at --address {address} ({shown_reason(error)}); check the address, and Ray's "
        "version and token"
    )


def _short_folder() -> Path:
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="lfm2-", dir=base if len(base) <= _LONGEST_FOLDER - 14 else "/tmp"))


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it a Ray that is started has the address 127.0.0.1, as on systems where Ray knows no clusters; its servers
    listen there alone. On Linux it would take the network's."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _patiently() -> Iterator[None]:
    """Within it a node that is started may take its time until it is known."""
    look = services.get_node

    def get_node(*args: Any) -> Any:
        ends = time.monotonic() + _START_S
        while True:
            try:
                return look(*args)
            except RuntimeError:
                interrupts.check()
                if time.monotonic() > ends:
                    raise
                time.sleep(_POLL_S / 4)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = look


@contextlib.contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables that the processes see which start within it."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
