import pytest
from small_dataset import make_dataset

from worldline.data.lerobot import Dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("evaluate") / "rooms")
