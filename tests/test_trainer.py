from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from spark_nn.store import RunDir
from spark_nn.trainer import publish, row_weights
from tests.gang.test_ring import Gang


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([0, 1, 2, 1]), [2, 1, 0.5, 1]),
        (np.array([0.0, 1.0, 2.0, 0.7], np.float32), [2, 1, 0.5, 1]),
        (np.array([-1, 2, 10**12, 0]), [1, 0.5, 1, 2]),
        (np.eye(3, dtype=np.float32)[[2, 0, 1, 2]], [0.5, 2, 1, 0.5]),
        (np.array([[0], [2]]), [2, 0.5]),
    ],
)
def test_each_row_counts_as_its_class_says(labels, expected):
    weights = {0: 2.0, 2: 0.5}
    assert row_weights({"label": labels}, weights).tolist() == expected
    own = np.linspace(1, 2, len(labels)).astype(np.float32)
    both = row_weights({"label:only": labels, "weight": own}, weights)
    np.testing.assert_allclose(both, own * expected, rtol=1e-6)
    np.testing.assert_allclose(own, np.linspace(1, 2, len(labels)), rtol=1e-6)


def test_without_class_weights_rows_count_as_their_column_says():
    assert row_weights({"label": np.array([1])}, {}) is None
    assert row_weights({"label": np.array([1]), "weight": np.array([3.0])}, {}).tolist() == [3.0]


@pytest.mark.timeout(60)
def test_a_model_may_take_longer_to_publish_than_a_rank_may_keep_silent(tmp_path):
    def write(path):
        time.sleep(2.5)
        path.write_bytes(b"weights")

    def work(ring):
        gang = SimpleNamespace(collective=ring, run=RunDir(tmp_path.as_uri()), attempt=0)
        found = publish(gang, write, ".bin") if ring.rank == 0 else None
        ring.barrier()
        return found

    with Gang(2, timeout=1) as gang:
        (name, _), other = gang.run(work)
    assert other is None
    assert (tmp_path / name).read_bytes() == b"weights"
