"""Callers who request a few sentences and notice every delay: answers of an assistant, announcements.

locust -f scenarios/shorts.py --headless --rate 1 -t 60s                     # Poisson
locust -f scenarios/shorts.py --headless --rate 1 --burstiness 4 -t 60s      # the same number, in bursts
locust -f scenarios/shorts.py --headless --stages 30s@0.5,60s@0.5..3,30s@0.5 -t 2m   # calm, a rush, calm
locust -f scenarios/shorts.py --headless -u 2 -i 20                          # 20 requests, then it ends
"""

from harness.scenario import MIXES, SpeechUser


class Caller(SpeechUser):
    """10 s of audio in the median, 60 s at most (see ``harness.scenario.MIXES``)."""

    mix = MIXES["shorts"].with_slos({"short": {"ttfa_p95_s": 1.0, "rtf_p95": 0.9, "stall_p95_s": 0.1}})
