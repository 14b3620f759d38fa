"""Text to token ids: the checkpoint's own tokenizer, or a stand-in that yields equally many tokens."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

# The splits of Qwen2's tokenizer: words with their leading space, single digits, runs of punctuation, line ends.
_PIECES = re.compile(r" ?[^\W\d_]+|\d|\n+| ?[^\s\w]+|\s+|_")
_LONGEST_PIECE = 7  # letters; gives the 1.31 to 1.42 tokens per English word of the released tokenizer
_BYTES = 6  # of UTF-8 per token of other scripts: about 0.6 tokens per Chinese character, punctuation included


class StandInTokenizer:
    """Splits text as the released tokenizer does and hashes each piece to an id: right in number, not in meaning."""

    def __init__(self, vocab_size: int, reserved: int):
        self.ids = vocab_size - reserved

    def encode(self, text: str) -> list[int]:
        pieces = (piece for match in _PIECES.finditer(text) for piece in _cut(match.group()))
        return [zlib.crc32(piece.encode()) % self.ids for piece in pieces]


class CheckpointTokenizer:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        # A user's "<|vision_pad|>" is text: as a special token it would be a placeholder for audio.
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def tokenizer_for(config, checkpoint: str = ""):
    """The tokenizer of a model: ``config`` is its ModelConfig, ``checkpoint`` its folder or ""."""
    if checkpoint and any(Path(checkpoint).glob("tokenizer*")):
        return CheckpointTokenizer(Path(checkpoint))
    if checkpoint:
        print(
            f"{checkpoint} holds no tokenizer: a text gets as many tokens as it would, not the right ones", flush=True
        )
    special = min(config.pad_token_id, config.audio_bos_token_id)
    return StandInTokenizer(config.text_config.vocab_size, config.text_config.vocab_size - special)


def _cut(piece: str) -> Iterator[str]:
    """Split a piece into tokens: 8 ASCII characters each, or 6 bytes of other characters."""
    if piece.isascii():
        for start in range(0, len(piece), _LONGEST_PIECE + 1):
            yield piece[start : start + _LONGEST_PIECE + 1]
        return
    size = _BYTES * (_LONGEST_PIECE + 1)  # per token, in units in which every character has a whole number
    sizes = [_BYTES if letter.isascii() else len(letter.encode()) * (_LONGEST_PIECE + 1) for letter in piece]
    tokens = [begun // size for begun in itertools.accumulate(sizes[:-1], initial=0)]
    for _, letters in itertools.groupby(zip(tokens, piece, strict=True), key=lambda pair: pair[0]):
        yield "".join(letter for _, letter in letters)
