"""What `fedpilot doctor` says of a machine."""

import importlib.metadata
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fedpilot import doctor
from fedpilot.engines.flower import machine
from tests.test_cli import fedpilot

Usage = namedtuple("Usage", "total used free")


def test_a_machine_that_runs_these_tests_has_no_problem(tmp_path: Path) -> None:
    found = list(doctor.examine(tmp_path / "not" / "yet"))
    assert [one for one in found if one.state == "problem"] == []
    assert [one.what for one in found] == ["python", "packages", "memory", "disk", "cache", "gpu", "threads"]
    (packages,) = [one for one in found if one.what == "packages"]
    for name in ("fedpilot", "torch", "peft", "flwr"):
        assert f"{name} {importlib.metadata.version(name)}" in packages.said


def test_a_package_of_another_version_or_none_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["torch==1.0", "absent>=2", "flwr==9; extra=='flower'"]
    )
    found = {one.what: one for one in doctor.packages() if one.state == "problem"}
    assert found["torch"].said == f"{importlib.metadata.version('torch')}, fedpilot needs ==1.0"
    assert (found["absent"].said, found["absent"].advice) == ("not installed", "pip install 'absent>=2'")
    assert found["flwr"].said == f"{importlib.metadata.version('flwr')}, fedpilot needs ==9"


def test_without_flower_only_serving_and_joining_are_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == "flwr" else version(name))
    (flower,) = [one for one in doctor.packages() if one.what == "flwr"]
    assert (flower.state, flower.said) == ("warning", "not installed")


def test_an_interpreter_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 9, 1))
    assert doctor.python().state == "problem"


def test_scarce_memory_and_disk_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 8, 2**20))
    assert (doctor.memory().state, doctor.memory().said) == ("warning", "1.0 MiB free")
    assert doctor.disk(tmp_path).state == "warning"


def test_a_cache_that_cannot_be_made_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPILOT_CACHE", str(tmp_path / "file" / "cache"))
    assert doctor.cache().state == "problem"
    monkeypatch.setenv("FEDPILOT_CACHE", str(tmp_path / "empty"))
    assert "is empty" in doctor.cache().said


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert doctor.threads().state == "warning"


def test_the_command_shows_findings_and_its_exit_code_says_whether_one_is_a_problem(tmp_path: Path) -> None:
    result = fedpilot("doctor", "--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "packages" in result.output
    found = json.loads(fedpilot("doctor", "--json").output)
    assert {one["state"] for one in found} <= {"ok", "warning"}
    keys = ["--ca", str(tmp_path / "ca.crt"), "--key", str(tmp_path / "key")]
    result = fedpilot("doctor", "--server", "127.0.0.1:9", *keys)
    assert result.exit_code == 1
    assert "is no certificate" in result.output
    assert fedpilot("doctor", "--server", "127.0.0.1:9").exit_code == 2
