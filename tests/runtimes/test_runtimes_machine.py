"""What the machine has, from Linux's own files as from psutil."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from vlm_edge_runtime import machine


@pytest.mark.skipif(sys.platform != "linux", reason="psutil itself is asked elsewhere")
def test_linux_says_what_psutil_says():
    assert machine.physical_cores() == psutil.cpu_count(logical=False)
    ratio = machine.available_memory() / psutil.virtual_memory().available
    assert 0.5 < ratio < 2  # of one moment and of another


def test_threads_of_one_core_are_one_core(tmp_path: Path):
    for cpu, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_cpus_list").write_text(siblings + "\n")
    (tmp_path / "cpufreq").mkdir()
    assert machine._cores(tmp_path) == 2


def test_cores_of_which_one_cannot_be_read_are_not_counted(tmp_path: Path, monkeypatch):
    """A folder cannot be read by anybody, as a core that was taken offline, or one that is denied."""
    for cpu in range(2):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
    (tmp_path / "cpu0" / "topology" / "core_cpus_list").write_text("0\n")
    assert machine._cores(tmp_path) == 1
    (tmp_path / "cpu1" / "topology" / "core_cpus_list").mkdir()
    assert machine._cores(tmp_path) == 0
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    assert machine.physical_cores() == psutil.cpu_count(logical=False)


def test_where_the_system_says_nothing_psutil_is_asked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    assert machine.physical_cores() == psutil.cpu_count(logical=False)
    assert machine.available_memory() > 0
