"""Settings: from the environment and from options, checked, and the same again in another process."""

import pytest

from harness.errors import InputError
from harness.service.keys import LOCAL, KeyRing
from harness.service.settings import StudioSettings, is_loopback

KEY = "a-key-that-is-long-enough"


def test_settings_are_the_same_in_another_process():
    given = StudioSettings(
        host="0.0.0.0", keys=(KEY, KEY + "2"), port=0, segment_s=1.5, until_end=True, hosts=("a.example",), sessions=3
    )
    assert StudioSettings.from_environment(given.environment()) == given
    assert StudioSettings.from_environment({}) == StudioSettings()


def test_options_replace_the_environment():
    environment = {"HARNESS_STUDIO_PORT": "81", "HARNESS_STUDIO_JOBS_AT_ONCE": "7", "OTHER": "x"}
    made = StudioSettings.from_environment(environment, port=82, host=None)
    assert (made.port, made.jobs_at_once, made.host) == (82, 7, "127.0.0.1")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HARNESS_STUDIO_PORT": "much"}, "HARNESS_STUDIO_PORT is 'much': it must be a whole number"),
        ({"HARNESS_STUDIO_PORT": "70000"}, "HARNESS_STUDIO_PORT is 70000: it must lie in 0 to 65535"),
        ({"HARNESS_STUDIO_LEASE_S": "nan"}, "HARNESS_STUDIO_LEASE_S is nan"),
        ({"HARNESS_STUDIO_UNTIL_END": "maybe"}, "use 1 or 0"),
        ({"HARNESS_STUDIO_PROT": "1"}, "HARNESS_STUDIO_PROT is not a setting"),
        ({"HARNESS_STUDIO_KEYS": "short"}, "too weak"),
        ({"HARNESS_STUDIO_HOST": "0.0.0.0"}, "need a key"),
        ({"HARNESS_STUDIO_HOST": "studio.example"}, "need a key"),
    ],
)
def test_what_cannot_be_used_is_named(environment, said):
    with pytest.raises(InputError, match=said):
        StudioSettings.from_environment(environment)


def test_a_key_is_in_no_message_and_no_repr():
    assert KEY not in repr(StudioSettings(keys=(KEY,))) and "secret" not in repr(
        StudioSettings(redis="redis://:secret@h")
    )


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))


def test_owners_are_told_apart_by_their_keys():
    ring = KeyRing((KEY, KEY + "2"))
    owners = [ring.owner_of(f"Bearer {key}") for key in (KEY, KEY + "2")]
    assert len(set(owners)) == 2 and KEY not in "".join(owners) and ring.owner_of(f"bearer  {KEY}") == owners[0]
    assert [ring.owner_of(sent) for sent in ("", "Bearer", f"Bearer {KEY}x", KEY, "Bearer \xe9")] == [None] * 5
    assert KeyRing(()).owner_of("") == LOCAL


def test_names_of_the_service_are_compared_without_their_case():
    assert "studio.example.com" in StudioSettings(hosts=("Studio.Example.com",)).host_names
