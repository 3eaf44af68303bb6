"""What a user installs: the wheel alone, in an empty environment, with torch and nothing of the training stack."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

SMOKE = """
import sys, torch
from sdft_kernels.backends.cpu import library
from sdft_kernels import fused_linear_divergence
print("kernels compiled:", library.find() is not None)
h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
fused_linear_divergence(h, w, torch.randn(5, 8), w).loss.backward()
assert h.grad.isfinite().all() and w.grad.isfinite().all()
import sdft
assert "transformers" not in sys.modules
try:
    import transformers
except ImportError:
    print("no transformers here")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the built wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("sdft_kernels-0.1.0-*.whl")
    venv.create(folder / "empty", with_pip=True)
    python = folder / "empty" / "bin" / "python"
    (packages,) = (folder / "empty").glob("lib/python*/site-packages")
    for name in required("sdft-kernels"):
        lend(name, packages, set())
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "-c", ROOT / "constraints.txt", str(wheel)]
    subprocess.run(install, check=True)
    return python


def required(name: str) -> list[str]:
    """The packages that one asks for, without its extras."""
    wanted = [Requirement(text) for text in importlib.metadata.distribution(name).requires or ()]
    return [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]


def lend(name: str, packages: Path, lent: set[str]) -> None:
    """Put links to a package of this environment, and to all that it asks for, into another's folder of packages."""
    distribution = importlib.metadata.distribution(name)
    if canonicalize_name(distribution.name) in lent:
        return
    lent.add(canonicalize_name(distribution.name))
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (packages / top).exists():
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    for wanted in required(name):
        lend(wanted, packages, lent)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(python: Path, tmp_path: Path) -> None:
    done = subprocess.run([python, "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no transformers here" in done.stdout
    assert "kernels compiled: True" in done.stdout


@pytest.mark.slow
def test_without_a_c_compiler_the_loss_is_left_to_torch(python: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"  # without what an earlier build has left beside the sources
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CC": "false"})
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    before_the_other = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([python, "-c", SMOKE], cwd=tmp_path, env=before_the_other, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels compiled: False" in done.stdout


def test_importing_the_kernels_imports_no_training_stack() -> None:
    code = "import sys, sdft_kernels; print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'triton')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


USER_CODE = """
import torch
from sdft_kernels import FusedLinearDivergence, fused_linear_divergence, linear_token_stats

h, w = torch.randn(5, 8), torch.randn(100, 8)
out = fused_linear_divergence(h, w, h, w, divergence="jsd")
reveal_type(out.loss)
reveal_type(linear_token_stats(h, w).logprob)
fused_linear_divergence(h, w, h)
FusedLinearDivergence(beta="half")
"""


@pytest.mark.slow
def test_types_reach_a_users_mypy(python: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_CODE)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert found[0] == 'note: Revealed type is "torch._tensor.Tensor"', done.stdout
    assert found[1] == 'note: Revealed type is "torch._tensor.Tensor | None"', done.stdout
    assert found[2].startswith("error: Missing positional argument"), done.stdout
    assert found[3].startswith('error: Argument "beta" to "FusedLinearDivergence" has incompatible type "str"')


@pytest.mark.slow
def test_the_source_archive_is_whole_and_its_tests_run(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("sdft_kernels-*/")
    packed = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    made = {"__pycache__", ".pytest_cache"}
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and not made & set(path.parts)}
    assert {path for path in wanted if not any(part.endswith(".egg-info") for part in path.parts)} <= packed
    tests = ["tests/test_arguments.py", "tests/test_sdft_templates.py", "tests/test_chunking.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
