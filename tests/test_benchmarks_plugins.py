"""The benchmark of TRL's trainers with and without the fused loss."""

import csv

import pytest
import torch

from benchmarks import plugins

pytestmark = pytest.mark.peers


@pytest.mark.slow
def test_the_table_has_both_trainers_and_the_same_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(plugins, "measure_apart", plugins.measure)
    path, threads = tmp_path / "plugins.csv", torch.get_num_threads()
    shape = ["--vocabs", "2000", "--tokens", "32", "--hidden", "16", "--rounds", "1", "--threads", str(threads)]
    plugins.main(["--csv", str(path), *shape])
    rows = list(csv.DictReader(path.open()))
    assert [row["trainer"] for row in rows] == list(plugins.NAMES)
    assert all(float(row["loss"]) > 0 and float(row["fused_seconds"]) > 0 for row in rows)
    assert "MiB, TRL" in capsys.readouterr().out

    def wrong(case):
        return {**plugins.measure(case), "loss": float(case.fused)}

    monkeypatch.setattr(plugins, "measure_apart", wrong)
    with pytest.raises(RuntimeError, match=r"gkd computes 1\.0 with the fused loss and 0\.0 without"):
        plugins.main(["--trainers", "gkd", "--csv", str(path), *shape])
