"""What is shown while training runs."""

import io
import re

import pytest

from sdft.progress import display as progress
from sdft.progress.display import Display
from tests.test_sdft_trainer import trainer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(folder, file, **options):
    """What a run shows on `file`, a text for each time that it is written to, and the losses that it logged."""
    display = Display(file=file, silent=options.pop("silent", False))
    run = trainer(folder, callbacks=[display], max_steps=3, **options)
    run.show(display)
    run.train()
    display.close()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return file.getvalue().replace("\r", "\n").splitlines(), [f"loss {loss:.3f}" for loss in losses]


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_a_terminal_shows_every_phase_as_it_goes(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    options = {"rollout_backend": backend, "rollout_batch_size": 1 if backend == "generate" else None}
    frames, losses = shown(tmp_path, Terminal(), **options, max_forward_tokens=1)
    text = "\n".join(frames)
    counts = [
        tuple(map(int, found)) for found in re.findall(r"rollout: (\d+) of at most 12 tokens, (\d) of 2 fin", text)
    ]
    assert counts
    if backend == "generate":
        assert {tokens for tokens, _ in counts} >= set(range(1, 8))  # two batches of one after the other
        assert counts[0] == (1, 0) and max(ended for _, ended in counts) == 2
    assert re.search(r"finished, \d+ tokens/s", text) and re.search(r"\d+ MiB", text)
    for doing in ("score", "learn: 1 of 2 pieces", "learn: 2 of 2 pieces"):
        assert any(frame.endswith(doing) for frame in frames), doing
    for step, loss in enumerate(losses, start=1):
        of_step = [frame for frame in frames if f"training: {step}/3 " in frame]
        assert loss in of_step[-1]
    assert re.search(r"\d\d:\d\d left", frames[-1])


def test_elsewhere_there_is_a_plain_line_for_each_log(tmp_path):
    lines, losses = shown(tmp_path, io.StringIO())
    assert len(lines) == 3
    for step, (line, loss) in enumerate(zip(lines, losses, strict=True), start=1):
        expected = (
            rf"training: step {step} of 3, {loss}, \d+\.\d s a step, \d\d:\d\d left, \d+ tokens/s, \d+ MiB in \w+"
        )
        assert re.fullmatch(expected, line), line


@pytest.mark.parametrize("file", [Terminal, io.StringIO])
def test_nothing_is_shown_where_that_is_asked_for(file, tmp_path):
    assert shown(tmp_path, file(), silent=True)[0] == []
