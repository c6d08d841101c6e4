"""Fixtures of the attacks on the sandbox."""

import time
import uuid
from collections.abc import Iterator

import pytest
from sandbox_watch import Watch

from polarity.errors import UserError
from polarity.rewards import sandbox
from polarity.rewards.sandbox import find_sandbox


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where the strongest sandbox does not work."""
    try:
        found = find_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    if not found.hides_files:
        pytest.skip(f"only {found.name} works here; the attacks need bubblewrap")


def take_out_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    source = sandbox._runner_source()
    without = source.replace("MACHINES = {", "MACHINES = {} and {")
    assert without != source
    monkeypatch.setattr(sandbox, "_runner_source", lambda: without)


@pytest.fixture(params=["filter", "no filter"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no filter":
        take_out_filter(monkeypatch)
    return request.param


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A Watch; after the test none of its processes may be left."""
    watch = Watch(uuid.uuid4().hex)
    name, _, mark = watch.mark.decode().partition("=")
    monkeypatch.setitem(sandbox.ENVIRONMENT, name, mark)
    yield watch
    deadline = time.monotonic() + 5.0  # the kernel takes a killed process apart in its own time
    while (left := watch.marked()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, [(p / "cmdline").read_bytes()[:80] for p in left]
