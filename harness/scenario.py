"""The single import of a locustfile: the user class of the harness, and the parts of its traffic.

    from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass

    class Podcaster(SpeechUser):
        mix = Mix("podcasts", (TrafficClass("long", 1.0, Lengths.parse({"uniform": [60, 300]}), speakers=(2, 4)),))

Run it with ``locust -f FILE.py``; ``scenarios/`` holds longer examples.
"""

from harness.drive.user import SpeechUser
from harness.traffic.mix import MIXES, Lengths, Mix, TrafficClass

__all__ = ["MIXES", "Lengths", "Mix", "SpeechUser", "TrafficClass"]
