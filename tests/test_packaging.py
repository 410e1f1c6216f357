"""The installed environment: what must import, whose files won, and when the shim can go.

Two wheels here clobber each other (torchattacks carries an old `robustbench`) and one imports a
module that the index lacks (`autoattack`, see shims/), so the environment itself needs tests.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata as metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHIM = "purification-benchmark-autoattack-shim"
SHIM_CAN_GO = (
    "Delete shims/, its mentions in the Makefile, and the shim tests here; "
    "if `autoattack` is on the index, add it to the robustbench extra."
)


def installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if installed(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"optional, not installed: {', '.join(missing)} (see `make install`)"
    )


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter at the root: robustbench pulls in timm, and import state is what is tested."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_tests_is_ours():
    # robustbench's wheel installs a top-level package of the same name.
    import tests

    assert Path(tests.__file__).resolve() == ROOT / "tests" / "__init__.py"


@needs("robustbench", "torchattacks")
def test_extras_import_together():
    run = python(
        "import robustbench, torchattacks, autoattack, tests\n"
        "from robustbench.utils import load_model\n"
        "from autoattack.state import EvaluationState\n"
        "assert callable(robustbench.benchmark) and torchattacks.PGD and autoattack.AutoAttack\n"
        "print(tests.__file__)"
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).resolve() == ROOT / "tests" / "__init__.py"


@needs("robustbench")
def test_robustbench_files_are_its_own():
    files = installed("robustbench").files
    assert files
    altered = []
    for file in files:
        if file.hash is None or file.parts[0] != "robustbench":
            continue
        path = Path(file.locate())
        digest = hashlib.new(file.hash.mode, path.read_bytes()).digest() if path.exists() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            altered.append(str(file))
    assert not altered, (
        f"{len(altered)} files of robustbench are missing or not its own, e.g. {altered[:3]}: torchattacks' old copy "
        "overwrote them. Repair with: pip install --force-reinstall --no-deps robustbench -c constraints.txt"
    )


@needs("robustbench")
def test_shim_is_still_needed():
    owners = set(metadata.packages_distributions().get("autoattack", [])) - {SHIM}
    assert not owners, f"A real `autoattack` is installed, by {owners}. {SHIM_CAN_GO}"

    run = python("import sys; sys.modules['autoattack'] = None; import robustbench")
    assert run.returncode != 0, f"robustbench imports without `autoattack`. {SHIM_CAN_GO}"
    assert "import of autoattack halted" in run.stderr, f"robustbench fails for another reason:\n{run.stderr}"


@needs(SHIM)
def test_shim_yields_to_a_real_autoattack(tmp_path):
    # site-packages comes before the shim's entry on the path; stand in for it with a folder put there.
    (tmp_path / "autoattack.py").write_text("REAL = True\n")
    run = python(
        "import sys, sysconfig\n"
        "site = sys.path.index(sysconfig.get_path('purelib'))\n"
        f"sys.path.insert(site, {str(tmp_path)!r})\n"
        "import autoattack; print(autoattack.REAL)"
    )
    assert run.stdout.strip() == "True", run.stderr


@needs(SHIM)
def test_shim_runs_the_same_attack(tmp_path, capsys):
    """Called as robustbench calls it, the shim gives what pyautoattack gives under its own names."""
    import autoattack
    import pyautoattack

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 4, 4, generator=generator)
    linear = torch.nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 16, generator=generator))
        linear.bias.zero_()
    model = torch.nn.Sequential(torch.nn.Flatten(), linear).eval()
    y = model(x).argmax(1)
    log = tmp_path / "log.txt"

    ours = autoattack.AutoAttack(
        model,
        norm="Linf",
        eps=0.1,
        seed=0,
        attacks_to_run=["apgd-ce"],
        version="custom",
        device="cpu",
        log_path=log,
    )
    x_adv = ours.run_standard_evaluation(x, y, bs=4)
    assert "robust accuracy after APGD-CE" in log.read_text()
    assert "robust accuracy after APGD-CE" in capsys.readouterr().out
    theirs = pyautoattack.AutoAttack(model, attacks=["apgd-ce"], version="custom", eps=0.1, seed=0, device="cpu")
    expected, labels = theirs.run_standard_evaluation(x, y, batch_size=4)

    assert not torch.equal(x_adv, x), "the attack should change something on this model"
    assert torch.equal(x_adv, expected)
    assert torch.equal(ours.run_standard_evaluation(x, y, bs=4, return_labels=True)[1], labels)
    assert torch.equal(ours.run_standard_evaluation_individual(x, y, bs=4)["apgd-ce"], expected)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_exact_portable_and_cover_what_make_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), "no paths, hosts or local builds"
    pinned = {canonical(line.split("==")[0]) for line in lines}

    wanted = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra != "ray":  # too heavy for what it adds here: make does not install it
            wanted += requirements
    assert {canonical(re.match(r"[\w.-]+", item)[0]) for item in wanted} <= pinned
    assert not [item for item in wanted if "==" in item], "exact versions belong in constraints.txt"
