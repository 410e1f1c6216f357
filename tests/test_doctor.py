"""``doctor``: a healthy environment is called so, and each known way to break one is named with its remedy."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmark import checkpoints, cli, data, doctor


@pytest.fixture(autouse=True)
def importable(request, monkeypatch):
    """Importing robustbench in a process of its own takes seconds: one test does it, the others say that it works."""
    if "healthy" not in request.node.name:
        monkeypatch.setattr(doctor, "_import_fault", lambda name: None)


def by_id(found: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {f.id: f for f in found}


def install(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A distribution as pip lays it out: files and a RECORD with their sha256."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for file, text in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{file},sha256={digest},{len(text)}")
    (info / "RECORD").write_text("\n".join(lines) + "\n")


REAL = {"robustbench/__init__.py": "from .eval import benchmark\n", "robustbench/eval.py": "def benchmark(): ...\n"}
OLD = {
    "robustbench/__init__.py": "# nothing\n",
    "robustbench/eval.py": "# commented out\n",
    "torchattacks/__init__.py": "",
}


def test_this_environment_is_healthy(capsys, tmp_path):
    assert cli.main(["doctor", "--out", str(tmp_path), "--json"]) == cli.DONE
    found = {f["id"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert not [f for f in found.values() if f["status"] == "fail"]
    for name in ("python", "torch", "torch-torchvision", "data-embedded", "weights-diffpure", "write-out", "device"):
        assert found[name]["status"] == "pass", found[name]
    assert all(f["advice"] for f in found.values() if f["status"] != "pass"), "a finding comes with what mends it"
    assert cli.main(["doctor", "--out", str(tmp_path)]) == cli.DONE
    printed = capsys.readouterr()
    assert printed.out.startswith("OK   python") and "the main job can run" in printed.err


def test_torchattacks_installed_after_robustbench_is_seen_by_the_record(tmp_path):
    install(tmp_path, "robustbench", "1.1.1", REAL)
    install(tmp_path, "setuptools", "81.0.0", {})
    healthy = by_id(doctor.findings(path=[str(tmp_path)]))
    assert healthy["robustbench"].status == "pass" and healthy["pkg_resources"].status == "pass"
    install(tmp_path, "torchattacks", "3.5.1", OLD)  # writes over robustbench's files, as its wheel does
    broken = by_id(doctor.findings(path=[str(tmp_path)]))["robustbench"]
    assert broken.status == "warn" and "2 files aren't those of robustbench 1.1.1" in broken.value
    assert "pip install --no-deps torchattacks" in broken.advice
    assert broken.advice.index("torchattacks") < broken.advice.index("--force-reinstall --no-deps robustbench")
    shutil.rmtree(tmp_path / "robustbench")  # uninstalling either takes the files of both
    assert "2 files" in by_id(doctor.findings(path=[str(tmp_path)]))["robustbench"].value


def test_setuptools_82_has_no_pkg_resources(tmp_path):
    install(tmp_path, "robustbench", "1.1.1", REAL)
    install(tmp_path, "setuptools", "82.0.0", {})
    found = by_id(doctor.findings(path=[str(tmp_path)]))["pkg_resources"]
    assert (found.status, found.advice) == ("warn", "python -m pip install 'setuptools<82'")


def test_no_robustbench_and_a_request_of_2021(tmp_path):
    install(tmp_path, "torchattacks", "3.5.1", {"torchattacks/__init__.py": ""})
    install(tmp_path, "requests", "2.25.1", {})
    found = by_id(doctor.findings(path=[str(tmp_path)]))
    assert found["robustbench"].status == "warn" and "robustbench>=1.1.1" in found["robustbench"].advice
    assert found["torchattacks"].status == "warn" and "requests 2.25.1" in found["torchattacks"].value


def test_without_what_the_main_job_needs_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    shutil.copytree(Path(data.__file__).parent / "weights", tmp_path, dirs_exist_ok=True)
    broken = next((tmp_path / "fashion-mnist" / "diffpure").rglob("*.safetensors"))
    broken.write_bytes(b"truncated")
    assert cli.main(["doctor", "--out", str(tmp_path / "out")]) == cli.FAILED
    out = capsys.readouterr().out
    assert "FAIL weights-diffpure" in out and str(broken) in out and "→ " in out


def test_a_data_set_that_was_altered_or_a_package_that_does_not_import_fails(monkeypatch):
    monkeypatch.setattr(doctor, "EXCERPT", "0" * 64)
    assert by_id(doctor.findings())["data-embedded"].status == "fail"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = by_id(doctor.findings())["diffusers"]
    assert found.status == "fail" and "pip install -e ." in found.advice


def test_a_torchvision_of_another_index_is_recognised(monkeypatch):
    import torchvision.ops

    def missing(*arguments):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    found = by_id(doctor.findings())["torch-torchvision"]
    assert found.status == "fail" and "force-reinstall torch torchvision" in found.advice


def test_a_place_where_nothing_can_be_written(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = by_id(doctor.findings(out=str(tmp_path)))
    assert found["write-out"].status == "fail" and "--out" in found["write-out"].advice
    assert found["write-cache"].status == "warn" and "XDG_CACHE_HOME" in found["write-cache"].advice


def test_torch_told_to_execute_pickles_is_a_warning(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    found = by_id(doctor.findings())["safe-loading"]
    assert found.status == "warn" and "unset" in found.advice


@pytest.mark.parametrize("missing", ["pyarrow", "autoattack"])
def test_extras_that_are_missing_are_warnings(missing, monkeypatch):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n, *a: None if n == missing else real(n, *a))
    found = by_id(doctor.findings())[{"pyarrow": "parquet"}.get(missing, missing)]
    assert found.status == "warn" and "pip install" in found.advice


def test_a_robustbench_that_does_not_import_is_named(tmp_path, monkeypatch):
    install(tmp_path, "robustbench", "1.1.1", REAL)
    monkeypatch.setattr(doctor, "_import_fault", lambda name: "ModuleNotFoundError: No module named 'gdown'")
    found = by_id(doctor.findings(path=[str(tmp_path)]))["robustbench"]
    assert found.status == "warn" and "gdown" in found.value and "pip install" in found.advice
