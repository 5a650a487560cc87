from __future__ import annotations

from pathlib import Path

from spark_nn.dataset import memory


def test_the_container_s_limit_counts_where_it_is_the_smaller(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUPS", ())
    machine = memory.free_bytes()
    assert 0 < machine < 1 << 50
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, usage), (Path("/nonexistent"), usage)))
    usage.write_text("300")
    limit.write_text("1300\n")
    assert memory.free_bytes() == 1000
    limit.write_text("max\n")
    assert memory.free_bytes() > 1000
    limit.write_text("200")
    assert memory.free_bytes() == 0


def test_processes_of_one_machine_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    assert memory.fits(250, 1)
    assert not memory.fits(251, 1)
    assert memory.fits(125, 2)
    assert not memory.fits(126, 2)
