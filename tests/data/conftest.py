"""Keeps caches of indexes out of the user's home."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _cache_in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
