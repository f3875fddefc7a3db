"""For ``pytest bench``: one process, whatever the tests take."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    config.option.numprocesses = 0  # a benchmark has the machine to itself
