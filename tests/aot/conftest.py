"""A process of its own: libtpu and its settings must not meet tests that open a device."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def _libtpu(request: pytest.FixtureRequest) -> None:
    if any(not item.get_closest_marker("aot") for item in request.session.items):
        pytest.skip("compiles for a described TPU in a process of its own: python -m pytest tests/aot")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU\'s compiler comes with the tpu extra, no TPU needed: pip install -e ".[tpu,test]"')
