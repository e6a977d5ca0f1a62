"""``sweep --address``: the command on a Ray that others started, interrupted and given again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import closed_port
from tests.sweep.test_on_ray import SMALL, until

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
ONE_MEBIBYTE = 1 << 20
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
    pytest.mark.skipif(not RAY.exists(), reason="no ray command beside this Python"),
]


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A head node with one core, so that cells come one by one. Out: the environment that reaches it."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "PYTHONPATH": str(ROOT)}
    # A unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = closed_port()
        settings = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "num-cpus": 1,
            "object-store-memory": 80 * ONE_MEBIBYTE,
            "include-dashboard": "false",
            "temp-dir": folder,
        }
        with subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in settings.items())],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as head:
            try:
                assert head.stdout is not None
                assert any("Ray runtime started" in line for line in head.stdout)
                yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(head.pid, signal.SIGKILL)


@contextlib.contextmanager
def sweeping(plan: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "lfm2_export", "sweep", str(plan), "--address", environment["RAY_ADDRESS"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def test_a_sweep_on_a_cluster_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    (plan := tmp_path / "plan.yaml").write_text(SMALL)
    records = tmp_path / "out" / "records"
    with cluster() as environment:
        with sweeping(plan, environment) as first:
            until(lambda: next(records.glob("*.export.json"), None) or first.poll())
            first.send_signal(signal.SIGINT)
            out, err = first.communicate(timeout=600)
        print(err)
        assert first.returncode == 130
        assert (out, err.splitlines()[-1]) == ("", "lfm2-export: stopped by SIGINT")
        done = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
        report = json.loads((tmp_path / "out" / "sweep.json").read_text())
        assert (report["ok"], report["missing"]) == (1, 1)

        with sweeping(plan, environment) as second:
            out, err = second.communicate(timeout=600)
    print(err)
    assert second.returncode == 0
    title, head, *rows = out.splitlines()
    assert title.endswith("plan.yaml: 2 ok")
    assert [row.split()[:2] for row in rows] == [["tiny-dense-onnx-q8", "ok"], ["tiny-dense-onnx-fp32", "ok"]]
    assert "ray" not in f"{head}{out}{err}".lower().replace("connecting to ray at", "")
    assert {path: path.stat().st_mtime_ns for path in done} == done
