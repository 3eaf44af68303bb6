"""How long a test waits for another process before it takes it for hung, on any machine, beside anything else."""

import subprocess
import sys
import time

#: Seconds that a process with torch takes to start on two cores at rest.
AT_REST = 2.0


def patience(seconds: float) -> float:
    """A limit for what takes far fewer `seconds` at rest: as much longer as a process takes longer to start now."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return seconds * max(1.0, (time.monotonic() - started) / AT_REST)
