"""The copy of tritonserver that has no unary call."""

import stat

import pytest

from harness.deploy.distribution import find_files
from harness.deploy.unary import without_unary_call

SERVICE = b"/inference.GRPCInferenceService/"
NAMES = [SERVICE + name + b"\0" for name in (b"ModelReady", b"ModelInfer", b"ModelStreamInfer", b"ModelInferX")]


def test_only_the_unary_call_of_the_installed_server_gets_another_name(tmp_path):
    server, copy = find_files().server, tmp_path / "tritonserver"
    assert without_unary_call(server, copy)
    before, after = server.read_bytes(), copy.read_bytes()
    place = before.index(SERVICE + b"ModelInfer\0") + len(SERVICE)
    assert after == before[:place] + after[place : place + 10] + before[place + 10 :]
    assert after[place : place + 10].isalpha() and after[place : place + 10] != b"ModelInfer"
    assert copy.stat().st_mode & stat.S_IXUSR


def test_the_other_name_is_not_the_same_twice(tmp_path):
    server, copies = tmp_path / "server", [tmp_path / "a", tmp_path / "b"]
    server.write_bytes(b"".join(NAMES))
    for copy in copies:
        assert without_unary_call(server, copy)
    first, second = (copy.read_bytes() for copy in copies)
    assert first != second and all(name in first for name in NAMES if name != NAMES[1])


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", NAMES[1] * 2])
def test_another_server_is_copied_as_it_is(tmp_path, content):
    server, copy = tmp_path / "server", tmp_path / "copy"
    server.write_bytes(content)
    assert not without_unary_call(server, copy) and copy.read_bytes() == content
