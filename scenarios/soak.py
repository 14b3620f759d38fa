"""Hours at a low, steady rate, to find growing memory or growing frame times.

    locust -f scenarios/soak.py --headless -t 4h --records soak-monday

A progress line is printed every minute. The result reports the drift of memory and frame time, with the slope per
hour and its significance (Mann-Kendall). ``--rate`` and ``--every`` replace the values below.
"""

from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass


class Regular(SpeechUser):
    """Sessions of ten seconds to ten minutes, so that thousands open and close overnight."""

    options = {"rate": 0.1, "every": 60}
    mix = Mix(
        "soak",
        (
            TrafficClass("short", 0.6, Lengths.parse({"uniform": [10, 60]}), speakers=(1, 2)),
            TrafficClass(
                "long", 0.4, Lengths.parse({"lognormal": {"median": 120, "sigma": 0.6, "max": 600}}), speakers=(2, 4)
            ),
        ),
    )
