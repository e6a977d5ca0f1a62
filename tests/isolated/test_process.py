"""The process that renders templates: it is there when needed, and it never outlives or harms the one that asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from lfm2_export import chat_template
from lfm2_export.chat_template import RenderLimits, render
from lfm2_export.errors import GenerationError, ResourceError
from lfm2_export.isolated.process import PYTHON_VARIABLE, Child, Limits, Stopped

ROOT = Path(__file__).parents[2]
USER = [{"role": "user", "content": "Hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks are POSIX's")


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def script(code: str, **options) -> subprocess.Popen:
    """A program of its own that has ``render``, ``USER`` and ``ENDLESS``."""
    head = f"from lfm2_export.chat_template import *\nUSER, ENDLESS = {USER!r}, {ENDLESS!r}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)], **{"env": environment, "text": True} | options
    )


def output(code: str, **options) -> str:
    with script(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


def gone(process: psutil.Process, seconds: float) -> bool:
    _, alive = psutil.wait_procs([process], timeout=seconds)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive)  # of an init that reaps late


def test_threads_take_turns():
    found: dict[int, list[str]] = {}

    def work(index: int) -> None:
        found[index] = [render(f"{index}-{n}-{{{{ messages[0].content }}}}", USER) for n in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [f"{index}-{n}-Hello" for n in range(20)] for index in range(6)}


def test_it_starts_again_after_someone_killed_it():
    render("x", USER)
    (process,) = [child for child in children() if "lfm2_export.isolated.template" in child.cmdline()]
    process.kill()
    assert gone(process, 5)
    assert render("y", USER) == "y"


def test_no_zombie_is_left():
    for _ in range(3):
        with pytest.raises(GenerationError, match=r"takes more than 0\.05 s"):
            render(ENDLESS, USER, limits=RenderLimits(seconds=0.05))
    assert [child for child in children() if child.status() == psutil.STATUS_ZOMBIE] == []


@posix
def test_an_interrupt_in_the_middle_is_an_interrupt_and_nothing_is_left_of_it():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        render(ENDLESS, USER, limits=RenderLimits(seconds=30))
    assert time.monotonic() - started < 5
    assert [child for child in children() if "lfm2_export.isolated.template" in child.cmdline()] == []
    assert render("{{ messages[0].content }}", USER) == "Hello"


@posix
def test_ctrl_c_reaches_the_asking_process_alone(tmp_path):
    """A terminal sends it to the whole group."""
    process = script(
        "print(render('a', USER), flush=True)\nrender(ENDLESS, USER, limits=RenderLimits(seconds=30))",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == "a\n"
    (child,) = psutil.Process(process.pid).children()
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert error.count("KeyboardInterrupt") == 1
    assert gone(child, 2)


@posix
@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_when_the_asking_process_is_killed(busy):
    work = "render(ENDLESS, USER, limits=RenderLimits(seconds=1))" if busy else "input()"
    process = script(f"print(render('a', USER), flush=True)\n{work}", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == "a\n"
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    assert gone(child, 10)


@posix
def test_a_fork_has_a_process_of_its_own():
    out = output(
        """
        import os
        print(render("first", USER), flush=True)
        pid = os.fork()
        for index in range(50):
            who = "child" if pid == 0 else "parent"
            assert render(f"{who} {index}", USER) == f"{who} {index}"
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
        print("done", flush=True)
        """
    )
    assert out == "first\ndone\ndone\n"


@posix
@pytest.mark.parametrize("closed", ["0", "1", "2", "0, 1, 2"])
def test_closed_standard_streams_do_not_matter(tmp_path, closed):
    code = f"""
        import os
        for stream in ({closed},):
            os.close(stream)
        text = render("{{{{ messages[0].content }}}}", USER)
        open({str(tmp_path / "out")!r}, "w").write(text)
        os._exit(0)
        """
    with script(code, stdin=subprocess.DEVNULL) as process:
        process.wait(60)
    assert (tmp_path / "out").read_text() == "Hello"


@posix
@pytest.mark.parametrize("signals", ["SIGPROF", "SIGTERM, signal.SIGCHLD"])
def test_signals_that_the_asking_process_ignores_or_blocks(signals):
    out = output(
        f"""
        import signal
        for number in (signal.{signals},):
            signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        try:
            render(ENDLESS, USER, limits=RenderLimits(seconds=0.1))
        except GenerationError as error:
            print(error)
        print(render("b", USER))
        """
    )
    assert "takes more than 0.1 s" in out or "signal" not in out
    assert out.endswith("shorter conversation\nb\n")


def test_the_child_takes_nothing_of_the_environment_that_it_does_not_need(monkeypatch):
    if not Path("/proc/self/environ").exists():
        pytest.skip("this system does not show another process' environment")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    program = Child("lfm2_export.isolated.template", ("jinja2", "markupsafe"))
    before = children()
    program.start()
    try:
        (child,) = [process for process in children() if process not in before]
        names = {
            entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
        }
        assert {"HF_TOKEN", "LD_PRELOAD", "PYTHONSTARTUP", "PYTHONPATH", "HOME"}.isdisjoint(names)
        assert "TZ" in names
    finally:
        program.stop()


def test_modules_of_the_working_directory_are_not_taken(tmp_path):
    """A checkpoint's folder may hold anything."""
    for name in ("jinja2", "json", "markupsafe", "marshal", "lfm2_export"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    code = f"import os; os.chdir({str(tmp_path)!r}); print(render('fine', USER))"
    assert output(code) == "fine\n"


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/true", "/bin/cat", "", "relative"])
def test_without_an_interpreter_nothing_is_rendered(monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    chat_template._renderer.stop()
    with pytest.raises(ResourceError, match=rf"did not start \(.*\); set {PYTHON_VARIABLE} to the Python that") as info:
        render("x", USER)
    print(info.value)
    monkeypatch.undo()
    assert render("x", USER) == "x"


def test_a_frozen_program_may_name_an_interpreter(monkeypatch):
    chat_template._renderer.stop()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ResourceError, match="this program has no Python interpreter of its own"):
        render("x", USER)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert render("x", USER) == "x"


@posix
def test_without_room_for_another_process_it_says_so():
    out = output(
        """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))
        taken = []
        try:
            while True:
                taken.append(open("/dev/null"))
        except OSError:
            pass
        try:
            render("x", USER)
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    assert out.startswith(
        "ResourceError chat templates and tokenizers are opened in a process of their own, which did not"
    )
    assert "Too many open files" in out


def test_a_reply_beyond_its_limit_is_not_read():
    program = Child("lfm2_export.isolated.template", ("jinja2", "markupsafe"))
    import marshal

    request = marshal.dumps(("{{ 'x' * 1000 }}", {}, 10_000))
    try:
        with pytest.raises(Stopped, match="gives 1000 bytes, more than 999"):
            program.ask(request, Limits(seconds=2, memory=256 << 20, reply=999))
        assert program.ask(request, Limits(seconds=2, memory=256 << 20, reply=1000)) == b"x" * 1000
    finally:
        program.stop()
