"""What a user installs: the wheel alone, in an empty environment, with torch and nothing of the training stack."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import sys, torch
from sdft_kernels import fused_linear_divergence
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


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("sdft_kernels-0.1.0-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    for wanted in ("torch", str(wheel)):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, wanted], check=True)
    done = subprocess.run([python, "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no transformers here" in done.stdout


def test_importing_the_kernels_imports_no_training_stack() -> None:
    code = "import sys, sdft_kernels; print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'triton')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
