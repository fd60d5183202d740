"""The map over worker processes."""

import os

import pytest

from fusebert.train.errors import UserError
from fusebert.train.text.workers import ordered_map


def test_results_come_in_the_order_of_the_tasks_and_few_tasks_are_read_ahead():
    for workers in (1, 2):
        read = []
        results = ordered_map(abs, (read.append(i) or -i for i in range(100)), workers=workers)
        first = next(results)
        assert len(read) <= 2 * workers + 1
        assert [first, *results] == list(range(100))


def test_the_initializer_runs_in_each_worker(tmp_path):
    results = ordered_map(os.path.abspath, ["name"] * 8, workers=2, initializer=os.chdir, initargs=(tmp_path,))
    assert list(results) == [str(tmp_path / "name")] * 8


def test_a_worker_that_dies_is_reported():
    with pytest.raises(UserError, match=r"a worker process died.*fewer --workers"):
        list(ordered_map(os._exit, [1], workers=2))
