"""What a process that loads data reports, and what not."""

import os
import socket
import sys
from multiprocessing.resource_sharer import DupFd

import pytest

from crislit.data.workers import ignore_lost_connections


@pytest.mark.skipif(
    sys.platform != "linux", reason="tensors are handed over by descriptors on Linux"
)
def test_a_worker_whose_reader_has_ended_does_not_report_the_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.append(error))
    for silent in (False, True):
        if silent:
            ignore_lost_connections()
        reported.clear()
        handed = DupFd(1)  # as PyTorch hands over a batch, and a thread waits for who takes it
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(handed._id[0])  # type: ignore[attr-defined]
        os.close(handed.detach())  # is answered after that
        assert [isinstance(error, (ConnectionError, EOFError)) for error in reported] == (
            [] if silent else [True]
        )
    error = ValueError("of its own")
    sys.excepthook(ValueError, error, None)
    assert reported == [error]
