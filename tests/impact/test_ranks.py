"""One model over two processes: equal to one process to 1e-12 in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import local_elasticity as le

pytestmark = pytest.mark.exhaustive


def test_two_ranks_measure_what_one_process_does(tmp_path):
    script = Path(__file__).with_name("ranks_script.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*launch, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.manual_seed(0)
    model = le.networks.SimpleConv(3).double()
    x = torch.randn(7, 1, 32, 32, dtype=torch.float64)
    y, t = torch.arange(7) % 3, torch.randn(4, 1, 32, 32, dtype=torch.float64)
    for name, engine, targets, n in (
        ("replay", "replay", None, 7),
        ("linear", "linear", t, 7),
        ("few", "replay", t, 1),
    ):
        one = le.measure_across_ranks(  # without a process group: measure itself
            model,
            torch.nn.functional.cross_entropy,
            (x[:n], y[:n]),
            targets,
            update=le.SGD(lr=0.1),
            engine=engine,
        )
        for part in ("before", "after", "change", "source_after", "losses", "self_index"):
            torch.testing.assert_close(found[name][part], getattr(one, part), rtol=1e-12, atol=1e-12)
        assert float(one.change.abs().max()) > 1e-4
    assert any("4 of 7 sources on rank 0 of 2" in note for note in found["replay"]["notes"])
    for rank in range(2):
        assert "same weights" in (tmp_path / f"weights-{rank}").read_text()
        assert "same sources" in (tmp_path / f"dealt-{rank}").read_text()
    assert "on rank 1, InputError" in (tmp_path / "failed-0").read_text()
    assert "labels in 0..2" in (tmp_path / "failed-1").read_text()
