"""Tests sign their jobs with a key of their own."""

import pytest

from gralora_diffusion.studio.engine.signatures import STATE


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATE, str(tmp_path_factory.mktemp("state")))
        yield
