"""The one error that the testbed raises: its message is for the user, as it stands."""

from __future__ import annotations


class TestbedError(Exception):
    """The cluster can't be started, reached or stopped; the message says what is wrong and what to do."""

    __test__ = False  # pytest takes names that begin with "Test" for test classes
