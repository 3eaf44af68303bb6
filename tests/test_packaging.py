"""What a user installs: the wheel alone, in an empty environment, with torch and nothing of the training stack."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

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
    assert (tmp_path / "installed" / "sdft" / "report" / "assets" / "page.html").is_file()
    before_the_other = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([python, "-c", SMOKE], cwd=tmp_path, env=before_the_other, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels compiled: False" in done.stdout


def said_by(code: str) -> Any:
    """What Python code leaves in `said`, in a process of its own."""
    code = f"import json\nsaid = None\n{code}\nprint(json.dumps(said))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


LOADED = "import sys; said = sorted({name.split('.')[0] for name in sys.modules})"


def test_importing_the_kernels_imports_no_training_stack() -> None:
    assert not {"transformers", "triton", "sdft"} & set(said_by(f"import sdft_kernels; {LOADED}"))


@pytest.mark.parametrize(
    "code",
    [
        "import sdft.settings.config, sdft.settings.commands, sdft.settings.recipe",
        *(f"from sdft.cli import main; main(['{name}', '--help-all'])" for name in ("train", "eval", "generate")),
        "from sdft.cli import main; main(['train', '--learning_rat', '1'])",
    ],
)
def test_settings_and_help_are_had_without_torch(code: str) -> None:
    """All of transformers, its continuous batching too, comes with torch."""
    assert not {"torch", "transformers", "accelerate", "numpy"} & set(said_by(f"{code}; {LOADED}"))


def test_help_comes_at_once() -> None:
    """In 0.35 s on two cores."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sdft.cli", "train", "--help"], capture_output=True, check=True, cwd=ROOT)
    assert time.perf_counter() - started < 4


IMPORT = """
import time, torch
started = time.thread_time()
import sdft_kernels
said = time.thread_time() - started
"""


def test_importing_the_kernels_takes_little_more_than_torch() -> None:
    """0.1 s on two cores."""
    assert said_by(IMPORT) < 0.5


CALLS = """
import sys, time, torch
from sdft_kernels import fused_linear_divergence

def taken():
    hidden, weight = torch.randn(64, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    started, before = time.thread_time(), resident()
    fused_linear_divergence(hidden, weight, torch.randn(64, 64), weight.detach()).loss.backward()
    return time.thread_time() - started, (resident() - before) / 2**20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

modules = set(sys.modules)
first, second = taken(), taken()
said = first[0] - second[0], first[1] - second[1], sorted(set(sys.modules) - modules)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_the_first_loss_loads_nothing() -> None:
    """Torch's compiler and what it imports took 2 s and 150 MiB; without it they are 0.01 s and 10 MiB."""
    seconds, mib, modules = said_by(CALLS)
    assert not modules
    assert seconds < 0.3
    assert mib < 40


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
