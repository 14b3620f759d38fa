"""Hours at a low, steady rate: does memory grow, does a frame take longer than it did at first?

    locust -f scenarios/soak.py --headless -t 4h --records soak-monday

A line every minute says how it goes; the end says how memory and the time of a frame drifted, with the slope by the
hour and whether it is more than chance (Mann-Kendall). ``--rate`` and ``--every`` replace the values below.
"""

from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass


class Regular(SpeechUser):
    """Sessions of half a minute to ten minutes, so that thousands open and close in a night."""

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
