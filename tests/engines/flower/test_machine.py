"""What a machine has free, in its control groups and under its own limits."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpilot.engines.flower import deployment, machine
from fedpilot.errors import ClientError

MIB = 2**20


def proc(folder: Path, groups: str = "0::/box/inner\n", available_mib: int = 900) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available_mib * 1024} kB\n")
    (folder / "self" / "status").write_text("Name: x\nVmSize:\t 2048 kB\n")
    (folder / "self" / "cgroup").write_text(groups)
    (folder / "vmstat").write_text("pgfault 7\noom_kill 3\n")
    return folder


def group(folder: Path, limit: str, used_mib: int, cached_mib: int, *, old: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    (folder / most).write_text(limit + "\n")
    (folder / used).write_text(f"{used_mib * MIB}\n")
    name = "total_inactive_file" if old else "inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{name} {cached_mib * MIB}\n")


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "box" / "inner", "max", 50, 0)
    assert machine.free_memory(proc(tmp_path / "proc"), tmp_path / "cgroup") == 900 * MIB


def test_the_tightest_control_group_counts_and_file_caches_are_free(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "box" / "inner", str(500 * MIB), 100, 20)  # 420 left
    group(tmp_path / "cgroup" / "box", str(700 * MIB), 400, 30)  # 330 left
    assert machine.free_memory(proc(tmp_path / "proc"), tmp_path / "cgroup") == 330 * MIB


def test_the_older_kind_of_control_groups_counts_too(tmp_path: Path) -> None:
    root = tmp_path / "cgroup" / "memory"
    group(root / "docker", str(300 * MIB), 100, 0, old=True)
    group(root, str(2**63 - 4096), 100, 0, old=True)  # how it says that there is no limit
    groups = "5:cpu,memory:/docker\n1:name=systemd:/\n"
    assert machine.free_memory(proc(tmp_path / "proc", groups), tmp_path / "cgroup") == 200 * MIB


def test_a_limit_of_the_process_itself_counts(tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path; from fedpilot.engines.flower import machine\n"
        "size = machine._kib(Path('/proc/self/status'), 'VmSize')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 64 * 2**20, -1))\n"
        "free = machine.free_memory(); assert 32 * 2**20 < free <= 64 * 2**20, free\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_machine_that_does_not_say_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="give --memory"):
        machine.free_memory(tmp_path, tmp_path)


def test_the_kernels_kills_for_memory_are_counted(tmp_path: Path) -> None:
    assert machine.oom_kills(proc(tmp_path / "proc")) == 3
    assert machine.oom_kills(tmp_path / "none") == 0
    assert machine.oom_kills() >= 0


def test_a_process_ends_with_the_one_that_started_it() -> None:
    child = "from fedpilot.engines.flower import machine; machine.follow_parent(); print('up', flush=True); input()"
    code = (
        "import subprocess, sys, os, signal\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, stdin=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert parent.returncode == -signal.SIGKILL
    for _ in range(100):
        if not _runs(int(parent.stdout)):
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("the child is still there")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_process_started_ends_with_it_wherever_it_is() -> None:
    """A grandchild in a session of its own whose parent leaves at the first signal, as Flower's server app."""
    child = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True)\n"
        "time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    with process.stdout:
        grandchild = int(process.stdout.readline())
    assert machine.descendants(process.pid) == {grandchild: machine.begun(grandchild)}
    deployment.end(process)
    assert process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 20
    while machine.begun(grandchild) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert machine.begun(2**22 + 1) is None
