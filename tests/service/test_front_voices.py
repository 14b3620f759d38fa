"""Voices that users add: what is taken, whose it is, and what is refused."""

import io
import struct

import numpy as np
import soundfile
from service_parts import KEYS, Service, bearer

from harness.service.voices import lay_out


def voice(seconds=2.0, rate=16_000, subtype="PCM_16", channels=1, format="WAV"):
    data = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(int(seconds * rate)) / 20)
    soundfile.write(data, np.repeat(samples[:, None], channels, 1), rate, subtype, format=format)
    return data.getvalue()


def test_a_voice_is_added_and_belongs_to_its_key(settings, target, tmp_path):
    lay_out(tmp_path / "voices", "")
    with Service(settings(url=target, keys=KEYS, voices=str(tmp_path / "voices")), works=False) as service:
        add = lambda key, name, data: service.post("/v1/voices", files={"file": (name, data)}, headers=bearer(key))  # noqa: E731
        answer = add(KEYS[0], "../../Anna <b>.wav", voice())
        assert answer.status_code == 201 and answer.json() == {"id": 5, "name": "Anna b"}
        assert add(KEYS[1], "other.wav", voice(subtype="FLOAT", channels=2)).json()["id"] == 6
        assert [each["id"] for each in service.get("/v1/voices", headers=bearer(KEYS[0])).json()] == [1, 2, 3, 4, 5]
        sample = service.get("/v1/voices/5/sample", headers=bearer(KEYS[0]))
        assert soundfile.info(io.BytesIO(sample.content)).frames == 48_000
        assert service.get("/v1/voices/5/sample", headers=bearer(KEYS[1])).status_code == 404
        task = {"script": "Speaker 1: hello", "voices": [5]}
        assert service.post("/v1/tasks", task, headers=bearer(KEYS[0])).status_code == 202
        assert service.post("/v1/tasks", task, headers=bearer(KEYS[1])).status_code == 422
        assert sorted(path.parent.name for path in tmp_path.rglob("*Anna*")) == ["voices"]


def test_what_is_no_voice_is_refused(settings, target, tmp_path):
    lay_out(tmp_path / "voices", "")
    bad = {
        "a flac": voice(format="FLAC"),
        "compressed": voice(subtype="IMA_ADPCM"),
        "long": voice(seconds=70, rate=8000),
        "short": voice(seconds=0.2),
        "wrong rate": voice(rate=12_345),
        "many channels": voice(channels=4),
        "text": b"hello",
        "nothing": b"",
        "cut off": voice()[:40],
        "a claim of much": voice()[:40] + struct.pack("<I", 0xFFFF_FFF0),
    }
    with Service(settings(url=target, voices=str(tmp_path / "voices"), voice_bytes=2_000_000), works=False) as service:
        for name, data in bad.items():
            answer = service.post("/v1/voices", files={"file": ("v.wav", data)})
            assert answer.status_code == 422 and answer.json()["detail"][0]["message"], name
        assert service.post("/v1/voices", files={"file": ("v.wav", bytes(2_100_000))}).status_code == 413
        assert len(service.get("/v1/voices").json()) == 4 and service.get("/healthz").status_code == 200


def test_a_service_with_fixed_voices_takes_none(settings, target):
    with Service(settings(url=target), works=False) as service:
        assert service.post("/v1/voices", files={"file": ("v.wav", voice())}).status_code == 409
