"""The stand-in tokenizer: as many tokens as the released one, in any script."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.vibevoice.entry.tokenizer import _PIECES, StandInTokenizer, _cut

TOKENIZER = StandInTokenizer(vocab_size=151_936, reserved=300)


@pytest.mark.parametrize(
    ("text", "tokens_per_character"),
    [
        ("大家好，欢迎收听今天的节目。我们要讨论的是人工智能在语音合成领域的最新进展。", 0.6),
        ("みなさん、こんにちは。今日は音声合成の最新の進歩について話します。", 0.6),
        ("여러분 안녕하세요. 오늘은 음성 합성의 최신 발전에 대해 이야기합니다.", 0.5),
        ("สวัสดีทุกคนยินดีต้อนรับสู่รายการของเราวันนี้เราจะพูดคุยเกี่ยวกับปัญญาประดิษฐ์", 0.6),
        ("Добрый день, сегодня мы говорим о будущем синтеза речи.", 0.4),
        ("Good morning, and welcome to the programme about the synthesis of speech.", 0.2),
    ],
)
def test_every_script_has_about_as_many_tokens_as_the_released_tokenizer_gives(text, tokens_per_character):
    assert len(TOKENIZER.encode(text)) / len(text) == pytest.approx(tokens_per_character, rel=0.2)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello there.", ["Hello", " there", "."]),
        (" transformation", [" transfo", "rmation"]),
        ("It’s — well…", ["It", "’", "s", " —", " well", "…"]),
        ("café", ["café"]),
        ("语音合成的", ["语音", "合成", "的"]),
    ],
)
def test_english_is_cut_as_ever_and_other_scripts_by_their_bytes(text, pieces):
    assert [part for piece in _PIECES.findall(text) for part in _cut(piece)] == pieces


@given(st.text(min_size=1))
def test_nothing_of_a_piece_is_lost(piece):
    assert "".join(_cut(piece)) == piece and all(_cut(piece))


@given(st.text(st.characters(codec="ascii"), min_size=1))
def test_ascii_is_cut_into_eights(piece):
    assert [len(part) for part in _cut(piece)][:-1] == [8] * ((len(piece) - 1) // 8)
