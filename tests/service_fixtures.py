"""Fixtures of the job service: a real Redis, and a server that speaks. Beside conftest.py, of which there is one."""

import pytest


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    from harness.service.redis_server import RedisServer

    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server):
    """The URL of an empty Redis."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def conduct():
    """How the server of ``target`` speaks; it may be changed at any time."""
    from speaking_triton import Conduct

    return Conduct()


@pytest.fixture
def target(conduct):
    """The address of a server that speaks as ``conduct`` says."""
    from speaking_triton import speaking

    with speaking(conduct) as fake:
        yield fake.url


@pytest.fixture
def settings(redis_url, tmp_path):
    """``settings(**more)``: a studio's settings with short times; segments are of four frames."""
    from harness.service.settings import StudioSettings

    def made(**more):
        given = dict(redis=redis_url, folder=str(tmp_path), segment_s=4 / 7.5, lease_s=1.0, port=0)
        return StudioSettings(**{**given, **more})

    return made
