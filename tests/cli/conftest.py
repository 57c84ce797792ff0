"""What tests of commands share."""

import pytest

from tests.cli.machines import HEALTHY, write


@pytest.fixture
def machine(tmp_path):
    """A healthy machine without RDMA."""
    return write(tmp_path, HEALTHY)
