"""A process takes the cores that it is given."""

import os

import pytest

from experiments import study
from fedsim.cores import SHARE, cores


def test_a_process_takes_the_share_it_was_told(monkeypatch):
    monkeypatch.delenv(SHARE, raising=False)
    assert 1 <= cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv(SHARE, "3")
    assert cores() == 3


@pytest.mark.parametrize("told", ["0", "all", "-1", "1.5"])
def test_a_share_that_is_no_number_is_named(told, monkeypatch):
    monkeypatch.setenv(SHARE, told)
    with pytest.raises(ValueError, match=f"FEDSIM_CORES must be a whole number >= 1, got '?{told}'?"):
        cores()


@pytest.mark.parametrize(("workers", "share"), [(2, 3), (30, 1)])
def test_the_processes_of_a_study_share_the_cores(workers, share, monkeypatch):
    monkeypatch.setenv(SHARE, "7")
    with study.processes(workers) as pool:
        assert pool.submit(cores).result() == share
