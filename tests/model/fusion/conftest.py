import pytest

from fusebert.model.fusion import swap


@pytest.fixture(autouse=True)
def fused_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too the fused code runs, on the reference, although there the original code would.

    A test with the fixture ``as_on_this_device`` runs what users have.
    """
    if "as_on_this_device" not in request.fixturenames:
        monkeypatch.setattr(swap, "kernels_run", lambda args, kwargs: True)


@pytest.fixture
def as_on_this_device() -> None:
    pass
