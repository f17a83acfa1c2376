"""The rate of matrix products, on a clock that is known."""

from types import SimpleNamespace

from dflash.training import machine


def test_the_best_round_counts_and_the_first_does_not(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert machine.matmul_rate(size=64, rounds=3) == 2 * 64**3 / 0.25
