"""Estimates of disk and memory, and the refusals that follow from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lfm2_export import resources
from lfm2_export.errors import ResourceError
from lfm2_export.resources import (
    available_memory,
    check_disk,
    check_memory,
    disk_needed,
    export_memory_needed,
    free_disk,
    human_bytes,
    usable_cores,
)


def test_refuses_an_artifact_that_the_disk_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    out = tmp_path / "not" / "there" / "yet"
    check_disk(out, 3_000_000_000)
    with pytest.raises(ResourceError) as caught:
        check_disk(out, 5_300_000_000)
    print(caught.value)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        f"{out}: the artifact needs 5.3 GB of disk, 3.0 GB are free; free space or give another --output"
    )
    assert not (tmp_path / "not").exists()


def test_refuses_work_that_the_memory_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 900_000_000)
    check_memory(900_000_000)
    with pytest.raises(ResourceError) as caught:
        check_memory(1_200_000_000, purpose="exporting LFM2-8B-A1B")
    assert str(caught.value).startswith(
        "exporting LFM2-8B-A1B needs 1.2 GB of memory, 900.0 MB are available; close other programs"
    )


def test_unknown_figures_let_the_work_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> object:
        raise OSError("no such call")

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    monkeypatch.setattr(resources, "available_memory", lambda: None)
    check_disk(tmp_path, 1 << 60)
    check_memory(1 << 60)


def test_the_machines_own_figures_are_plausible(tmp_path: Path) -> None:
    memory, disk = available_memory(), free_disk(tmp_path / "a" / "b")
    print(f"memory {memory}, disk {disk}")
    assert memory is not None
    assert 1 << 20 < memory < 1 << 50
    assert disk is not None
    assert disk > 0


def test_the_system_counts_available_memory_and_swap(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   60 kB\nSwapFree: 4 kB\n")
    assert resources._system_memory(meminfo) == 64 * 1024
    meminfo.write_text("MemTotal: 100 kB\n")
    assert resources._system_memory(meminfo) == resources._physical_memory()


@pytest.mark.parametrize(
    ("line", "folder", "files", "prefix"),
    [
        ("0::/box/job", "box", ("memory.max", "memory.current"), ""),
        ("4:cpu,memory:/box/job", "memory/box", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ],
)
def test_a_container_limit_counts_without_its_page_cache(
    tmp_path: Path, line: str, folder: str, files: tuple[str, str], prefix: str
) -> None:
    group = tmp_path / folder
    (group / "job").mkdir(parents=True)
    (group / files[0]).write_text("1000\n")
    (group / files[1]).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 400\n{prefix}inactive_file 250\n{prefix}active_file 50\n")
    (group / "job" / files[0]).write_text("max\n")
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/\n{line}\n")
    assert list(resources._cgroup_memory(tmp_path, own)) == [600]
    assert list(resources._cgroup_memory(tmp_path, tmp_path / "missing")) == []


def test_estimates_grow_with_the_work() -> None:
    eight_b = disk_needed([5_300_000_000])
    memory = export_memory_needed(2048 * 7168)
    print(f"disk {human_bytes(eight_b)}, memory {human_bytes(memory)}")
    assert 5_300_000_000 < eight_b < 5_500_000_000
    assert disk_needed([10, 20]) >= 30
    assert 500_000_000 < memory < 1_200_000_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (16_000_000_000, "16.0 GB"), (10**13, "10.0 TB")],
)
def test_sizes_read_like_a_persons(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_cores(tmp_path) == 4
    assert usable_cores(tmp_path / "nothing") == 6


def test_a_processor_is_named_as_it_names_itself(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One\n")
    assert resources.processor_name(tmp_path / "cpuinfo") == "A Fast One"
    assert resources.processor_name(tmp_path / "none")
