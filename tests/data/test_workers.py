"""Errors that worker processes report and ignore."""

import os
import socket
import sys
from multiprocessing.resource_sharer import DupFd

import pytest

from crislit.data.workers import ignore_lost_connections


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shares tensors by descriptors")
def test_a_worker_ignores_connections_lost_to_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.append(error))
    for ignore in (False, True):
        if ignore:
            ignore_lost_connections()
        reported.clear()
        # Share a descriptor as PyTorch shares a batch, from a thread that waits for a reader.
        shared = DupFd(1)
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(shared._id[0])  # type: ignore[attr-defined]
        # The thread serves one reader at a time, so the lost one has been handled after this.
        os.close(shared.detach())
        lost = [isinstance(error, (ConnectionError, EOFError)) for error in reported]
        assert lost == ([] if ignore else [True])
    error = ValueError("not a connection error")
    sys.excepthook(ValueError, error, None)
    assert reported == [error]
