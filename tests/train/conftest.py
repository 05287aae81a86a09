from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_run import collect_tiny

    return collect_tiny(tmp_path_factory.mktemp("data") / "two_room")


@pytest.fixture(scope="session")
def finished_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted; only to be read."""
    from tiny_run import tiny_config

    from worldline.train.loop import train

    return train(tiny_config(tiny_data, tmp_path_factory.mktemp("runs") / "whole"))
