"""A real Redis for the tests of the job service, and a server that speaks."""

import pytest
import redis
from speaking_triton import Conduct, speaking

from harness.service.redis_server import RedisServer
from harness.service.settings import StudioSettings


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server):
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def conduct():
    return Conduct()


@pytest.fixture
def target(conduct):
    """The address of a server that speaks as ``conduct`` says."""
    with speaking(conduct) as fake:
        yield fake.url


@pytest.fixture
def settings(redis_url, tmp_path):
    """``settings(**more)``: a studio's settings with short times; segments are of four frames."""

    def made(**more):
        given = dict(redis=redis_url, folder=str(tmp_path), segment_s=4 / 7.5, lease_s=1.0, port=0)
        return StudioSettings(**{**given, **more})

    return made
