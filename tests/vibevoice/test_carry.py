"""Kept sessions as bytes: whole ones come back as they were, anything else is refused in words."""

import hmac
import io
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.sessions.carry import CODE_BYTES, TOKENS, Past, model_mark, script_mark

FRAME, BEGIN, END, STOP = TOKENS
KEY, OTHER_KEY = "k" * 64, "o" * 64


def sealed(data):
    """These bytes with a valid code, as only the deployment can make it."""
    return hmac.digest(KEY.encode(), data, "sha256") + data


def past_of(tokens=(FRAME, END, BEGIN, FRAME, FRAME), say=(), seed=7, start_frame=0, state=5):
    numbers = np.random.default_rng(1)
    frames = list(tokens).count(FRAME)
    return Past(
        model="m" * 64,
        script="s" * 64,
        seed=seed,
        start_frame=start_frame,
        tokens=np.array(tokens, np.int32),
        latents=numbers.standard_normal((frames, wire.LATENT_SIZE), np.float32),
        semantics=numbers.standard_normal((frames, wire.SEMANTIC_SIZE), np.float32),
        say=np.array(say, np.int32),
        state=numbers.standard_normal(state, np.float32),
    )


def assert_equal(one, other):
    for field in fields(Past):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@given(
    tokens=st.lists(st.sampled_from(TOKENS), min_size=1, max_size=30),
    say=st.lists(st.sampled_from(TOKENS), max_size=5),
    seed=st.integers(0, 2**63 - 1),
    start_frame=st.integers(0, wire.MAX_FRAMES),
    state=st.integers(0, 20),
)
def test_a_kept_session_comes_back_as_it_was(**given_):
    past = past_of(**given_)
    again = Past.decode(past.encode(KEY), KEY)
    assert_equal(again, past)
    assert again.frames == given_["tokens"].count(FRAME)
    assert again.ended == (given_["tokens"][-1] == STOP)


@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=30), st.integers(1, 40))
def test_every_step_is_fed_the_frame_before_it(tokens, size):
    """What a step after another token is fed does not matter: the token itself is."""
    past = past_of(tokens)
    said, latents, semantics = (np.concatenate(column) for column in zip(*past.parts(size), strict=True))
    assert said.tolist() == tokens
    spoken = 0
    for step in range(1, len(tokens)):
        if tokens[step - 1] == FRAME:
            np.testing.assert_array_equal(latents[step], past.latents[spoken])
            np.testing.assert_array_equal(semantics[step], past.semantics[spoken])
            spoken += 1


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_are_refused(data):
    whole = past_of().encode(KEY)
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        flip = data.draw(st.integers(1, 255))
        damaged = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    elif kind == "cut":
        damaged = whole[:place]
    else:
        damaged = whole[:place] + b"\x00" + whole[place:]
    try:
        Past.decode(damaged, KEY)
    except RequestError as error:
        assert "carry is damaged" in str(error) and "\n" not in str(error)
    else:
        pytest.fail(f"taken, although {kind} at {place}")


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x05\x06" + bytes(18), bytes(1000)])
def test_what_never_was_a_carry_is_refused(data):
    with pytest.raises(RequestError, match="carry is damaged"):
        Past.decode(data, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"latents": np.zeros((2, wire.LATENT_SIZE), np.float32)},
        {"semantics": np.zeros((3, 7), np.float32)},
        {"tokens": np.array([9], np.int32)},
        {"tokens": np.array([], np.int32)},
        {"tokens": np.zeros(3, np.float32)},
        {"say": np.array([[1]], np.int32)},
        {"state": np.array([b"x"])},
        {"state": np.zeros(5, ">f4")},
        {"latents": np.full((3, wire.LATENT_SIZE), np.nan, np.float32)},
        {"semantics": np.full((3, wire.SEMANTIC_SIZE), np.inf, np.float32)},
        {"state": np.array([0, -np.inf], np.float32)},
        {"seed": -1},
        {"start_frame": wire.MAX_FRAMES + 1},
    ],
)
def test_values_that_do_not_fit_together_are_refused(change):
    with pytest.raises(RequestError, match="carry is damaged"):
        Past.decode(replace(past_of(), **change).encode(KEY), KEY)


def test_compressed_or_pickled_contents_are_not_unpacked():
    packed, file = io.BytesIO(), io.BytesIO(past_of().encode(KEY)[CODE_BYTES:])
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(RequestError, match="compressed"):
        Past.decode(sealed(packed.getvalue()), KEY)
    with pytest.raises(RequestError, match="carry is damaged"):
        Past.decode(replace(past_of(), say=np.array([object()])).encode(KEY), KEY)


def test_another_model_or_script_is_refused_by_what_differs():
    past = past_of()
    past.check_owner("m" * 64, "s" * 64)
    with pytest.raises(RequestError, match="another model or other weights"):
        past.check_owner("x", "s" * 64)
    with pytest.raises(RequestError, match="another script or other voices"):
        past.check_owner("m" * 64, "x")
    with pytest.raises(RequestError, match="nothing to resume"):
        past_of((FRAME, STOP)).check_owner("m" * 64, "s" * 64)


def test_marks_tell_models_and_scripts_apart(tmp_path):
    voices = {1: np.zeros(10, np.float32), 2: np.ones(10, np.float32)}
    scripts = {script_mark(ids, used, voices) for ids in ((1, 2), (1, 3), (12,)) for used in ((), (1,), (2,), (1, 2))}
    assert len(scripts) == 12
    sizes = tmp_path / "own.json"
    marks = [model_mark("tiny", 0, ""), model_mark("tiny", 1, ""), model_mark("1.5b", 0, "")]
    for text in ("{}", '{"hidden_size": 32}'):
        sizes.write_text(text)
        marks.append(model_mark(str(sizes), 0, ""))
    for content in (b"a" * 300_000, b"b" * 300_000, b"b" * 300_001):
        (tmp_path / "model.safetensors").write_bytes(content)
        marks.append(model_mark("tiny", 0, str(tmp_path)))
    assert len(set(marks)) == len(marks) and model_mark("tiny", 0, "") == marks[0]


@pytest.mark.parametrize("change", [{}, {"seed": 8}, {"latents": np.ones((3, wire.LATENT_SIZE), np.float32)}])
def test_a_past_that_was_made_elsewhere_is_refused_whatever_it_holds(change):
    with pytest.raises(RequestError, match="not made by this deployment.*carry_key_file"):
        Past.decode(replace(past_of(), **change).encode(OTHER_KEY), KEY)
    with pytest.raises(RequestError, match="not made by this deployment"):
        Past.decode(replace(past_of(), **change).encode(KEY)[CODE_BYTES:], KEY)
