"""Callers of a speech service: many request a few sentences, some a podcast with several speakers.

    locust -f scenarios/podcast.py                                    # Locust's web page; see its Speech tab
    locust -f scenarios/podcast.py --headless -u 4 -t 30s             # closed loop: 4 users, one request after another
    locust -f scenarios/podcast.py --headless --rate 0.5 -t 60s       # open loop: 0.5 requests per second, Poisson
    locust -f scenarios/podcast.py --headless --ladder 1,2,4,8        # how does it scale with the number of users?

Add ``--host grpc://HOST:8001`` to use your own Triton. Without it a running ``harness serve`` is used, or a Triton is
started for as long as Locust runs. ``--help-speech`` lists all options.
"""

from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass


class Podcaster(SpeechUser):
    """Lengths are seconds of audio. ``--mix NAME``, ``--mix FILE.yaml`` or ``--plan PLAN.yaml`` replaces this mix."""

    mix = Mix(
        "podcaster",
        (
            TrafficClass(
                "short",
                0.7,
                Lengths.parse({"uniform": [4, 16]}),
                speakers=(1, 2),
                slos={"ttfa_p95_s": 1.0, "rtf_p95": 0.9},
            ),
            TrafficClass(
                "podcast",
                0.3,
                Lengths.parse({"lognormal": {"median": 60, "sigma": 0.5, "max": 240}}),
                speakers=(2, 4),
                slos={"ttfa_p95_s": 1.5, "rtf_p95": 0.9},
            ),
        ),
    )
