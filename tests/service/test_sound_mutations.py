"""Damaged sounds as voices: each is read or refused with a reason, and memory is in proportion."""

import sys
from pathlib import Path

import numpy as np
import pytest

from harness.errors import InputError
from harness.service.wav_reading import read_wav

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "service"))

from sound_mutations import SoundMutations, _ogg_checksum  # noqa: E402


@pytest.mark.parametrize("seed", range(2))
def test_every_damaged_sound_is_read_or_refused_with_a_reason(seed):
    made, read = SoundMutations(np.random.default_rng(seed)), 0
    for _ in range(250):
        upload = made.next()
        try:
            samples = read_wav(upload.content, 60.0)
        except InputError as error:
            assert str(error)
        else:
            read += 1
            assert upload.kind in ("wav", "mixed") and samples.dtype == np.float32
            assert np.isfinite(samples).all() and 0.9 * 24_000 <= len(samples) <= 60 * 24_000
    assert 10 < read < 240, "mutations that are all refused, or all read, test nothing"


def test_the_same_seed_makes_the_same_sounds():
    one, other = (SoundMutations(np.random.default_rng(7)) for _ in range(2))
    assert [one.next() for _ in range(20)] == [other.next() for _ in range(20)]


def test_the_checksum_of_a_page_is_that_of_real_files():
    page = SoundMutations(np.random.default_rng(0))._ogg
    page = page[: page.index(b"OggS", 4)]
    assert _ogg_checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(page[22:26], "little")
