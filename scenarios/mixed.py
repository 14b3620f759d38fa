"""Short requests by count, podcasts of up to 90 minutes by work: 95 of 100 callers hear 10 seconds, 5 hear 40 minutes.

    locust -f scenarios/mixed.py --headless --rate 0.1 --steady 7 -t 2m
    locust -f scenarios/mixed.py --headless --trace TRACE.csv --rate 0.1 --steady 7 -t 2m   # arrivals of a real service
    locust -f scenarios/mixed.py --headless --rate 1 --tags short -t 60s                    # one class alone

A podcast lasts longer than such a test. ``--steady N`` starts with N sessions in progress; by Little's law that is
rate x mean audio x real-time factor (0.1 x 136 s x 0.5 is about 7). The end cuts them off: unfinished, not failed.
"""

from harness.scenario import MIXES, SpeechUser


class Listener(SpeechUser):
    """Add your own kinds of traffic as classes: see podcast.py."""

    mix = MIXES["mixed"].with_slos(
        {
            "short": {"ttfa_p95_s": 1.0, "rtf_p95": 0.9},
            "long": {"ttfa_p90_s": 2.0, "rtf_p90": 0.9, "stall_p90_s": 0.5},
        }
    )
