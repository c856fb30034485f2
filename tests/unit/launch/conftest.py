from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.cluster import Cluster, make_cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return make_cluster(tmp_path, monkeypatch)
