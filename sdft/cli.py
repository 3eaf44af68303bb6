"""The `sdft` command: what it is told, and how it ends.

Exit codes: 0 done (or training stopped by SIGTERM and saved), 1 the run went wrong, 2 it was asked for something that
cannot be, 130 interrupted by Ctrl-C, 143 ended by SIGTERM. A mistake is one line on stderr. Everything that can be
checked without torch and transformers, which take seconds to import, is checked before they are, rows too.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from sdft.command_lines import COMMANDS, HELP_FLAGS
from sdft.errors import Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in HELP_FLAGS:
        from sdft.settings.help import MAIN

        print(MAIN, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sdft.version import OURS, version_of

        print(f"sdft {version_of(OURS) or 'of a checkout that is not installed'}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        *others, last = COMMANDS
        return _fail(f"unknown command {command!r}; it may be {', '.join(others)} or {last}", 2)
    try:
        with _terminable():
            return _run(command, rest, started)
    except Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, unless it is dealt with or ignored already."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(command: str, rest: list[str], started: float) -> int:
    # Before torch starts its threads: ones that spin while they wait make a step on the CPU ten times slower as soon
    # as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Also before torch is imported: its large tensors then begin at pages of 2 MiB, and the C library's allocator
    # keeps a third as much of the memory that tensors have left.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may have characters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    from sdft.errors import TrainingError, UsageError

    try:
        from safetensors import SafetensorError

        return COMMANDS[command](rest, started) or 0
    except ModuleNotFoundError as error:
        return _fail(
            f"{error.name} is not installed; pip install 'sdft-kernels[train]' brings what the commands take", 2
        )
    except UsageError as error:
        return _fail(str(error), 2)
    except (TrainingError, OSError, SafetensorError) as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without an import of torch
            raise
        return _fail(f"memory ran out ({error}); a smaller per_device_eval_batch_size takes less", 1)


def _fail(message: str, code: int) -> int:
    print(f"sdft: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
