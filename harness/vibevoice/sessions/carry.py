"""A kept session as bytes (its carry), which any server of the same model can resume."""

from __future__ import annotations

import hashlib
import hmac
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.sessions.parts import parts_of

VERSION = 3  # version 2 stored sessions that began in mid-course differently: with their prompt read
TOKENS = (wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_SPEECH_END, wire.TOKEN_END_OF_TEXT)
_SAMPLE_BYTES = 1 << 16
CODE_BYTES = 32  # HMAC-SHA-256
MOST_BYTES = 128 << 20  # four times the size of 90 minutes
_TYPES = {
    "version": (np.int64, ()),
    "model": (np.str_, ()),
    "script": (np.str_, ()),
    "seed": (np.int64, ()),
    "start_frame": (np.int64, ()),
    "tokens": (np.int32, (-1,)),
    "latents": (np.float32, (-1, wire.LATENT_SIZE)),
    "semantics": (np.float32, (-1, wire.SEMANTIC_SIZE)),
    "say": (np.int32, (-1,)),
    "state": (np.float32, (-1,)),
}


@dataclass(frozen=True)
class Past:
    """A kept session. Its noise needs no state: row k of the seed's generator belongs to speech frame k.

    ``model`` and ``script`` are fingerprints; ``tokens`` [steps] are the generated wire.TOKEN_*, ``latents`` [frames,
    64] and ``semantics`` [frames, 128] those of its speech frames, ``say`` the forced tokens still to come, ``state``
    the convolution state [values].
    """

    model: str
    script: str
    seed: int
    start_frame: int
    tokens: np.ndarray
    latents: np.ndarray
    semantics: np.ndarray
    say: np.ndarray
    state: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.latents)

    @property
    def ended(self) -> bool:
        """Whether it generated "end of text"."""
        return len(self.tokens) > 0 and self.tokens[-1] == wire.TOKEN_END_OF_TEXT

    def parts(self, size: int, behind: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Its steps, at most ``size`` at a time: generated tokens, and the latents and semantics that each was fed.

        ``behind``: positions before them.
        """
        spoke_before = np.flatnonzero(self.tokens[:-1] == wire.TOKEN_SPEECH_FRAME) + 1
        latents = np.zeros((len(self.tokens), wire.LATENT_SIZE), np.float32)
        semantics = np.zeros((len(self.tokens), wire.SEMANTIC_SIZE), np.float32)
        latents[spoke_before] = self.latents[: len(spoke_before)]
        semantics[spoke_before] = self.semantics[: len(spoke_before)]
        for part in parts_of(len(self.tokens), size, behind):
            yield self.tokens[part], latents[part], semantics[part]

    def encode(self, key: str) -> bytes:
        """The session as an uncompressed .npz, preceded by an authentication code with the deployment's key."""
        file = io.BytesIO()
        np.savez(file, version=VERSION, **asdict(self))
        return _code(file.getvalue(), key) + file.getvalue()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Past:
        """Decode a session.

        Raises RequestError where the bytes were not made with this key, are incomplete or of another version.
        """
        if len(data) > MOST_BYTES:
            raise RequestError(f"{wire.CARRY} has {len(data)} bytes, but no session has more than {MOST_BYTES}")
        code, data = data[:CODE_BYTES], data[CODE_BYTES:]
        if not hmac.compare_digest(code, _code(data, key)):
            raise RequestError(
                f"{wire.CARRY} is damaged, or was not made by this deployment: send all bytes that the server sent; "
                "servers that resume each other's sessions need the same carry_key_file"
            )
        try:
            values = _read(data)
        except Exception as error:  # a foreign zip file can fail in many ways, all of them the client's
            raise RequestError(
                f"{wire.CARRY} is damaged ({type(error).__name__}: {error}): send the bytes that the server gave, "
                "all of them"
            ) from None
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def check_owner(self, model: str, script: str) -> None:
        """Raise RequestError where its model or script differs from these fingerprints."""
        if self.model != model:
            raise RequestError(
                f"{wire.CARRY} was kept by a server of another model or other weights: resume it on one of the same "
                "preset, weights seed and checkpoint"
            )
        if self.script != script:
            raise RequestError(
                f"{wire.CARRY} belongs to another script or other voices: send the {wire.TEXT_INPUT} and "
                f"{wire.SPEAKER_IDS} that it was kept with"
            )
        if self.ended:
            raise RequestError(f"the session in {wire.CARRY} has spoken its whole script: there is nothing to resume")


def _code(data: bytes, key: str) -> bytes:
    return hmac.digest(key.encode(), data, hashlib.sha256)


def _read(data: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed")  # a few bytes could expand to fill the memory
        if archive.testzip() is not None:
            raise ValueError("a checksum is wrong")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        values = {name: _value(name, arrays[name]) for name in _TYPES}
    if values["version"] != VERSION:
        raise ValueError(f"version {values['version']}, known is {VERSION}")
    _check(values)
    return values


def _value(name: str, array: np.ndarray):
    kind, shape = _TYPES[name]
    fits = array.ndim == len(shape) and all(want in (-1, size) for want, size in zip(shape, array.shape, strict=True))
    if not np.issubdtype(array.dtype, kind) or not array.dtype.isnative or not fits:
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array if shape else array.item()


def _check(values: dict) -> None:
    tokens = values["tokens"]
    frames = int((tokens == wire.TOKEN_SPEECH_FRAME).sum())
    if not len(tokens) or not frames == len(values["latents"]) == len(values["semantics"]):
        raise ValueError(f"{frames} frames, {len(values['latents'])} latents, {len(values['semantics'])} semantics")
    for name in ("tokens", "say"):
        if not np.isin(values[name], TOKENS).all():
            raise ValueError(f"{name} are not all of {TOKENS}")
    for name in ("latents", "semantics", "state"):
        if not np.isfinite(values[name]).all():
            raise ValueError(f"{name} hold what is no number")
    if values["seed"] < 0 or not 0 <= values["start_frame"] <= wire.MAX_FRAMES:
        raise ValueError(f"seed {values['seed']}, start frame {values['start_frame']}")


def model_mark(preset: str, weights_seed: int, checkpoint: str, emulated: bool = False) -> str:
    """A fingerprint of a model's weights: of a checkpoint's sizes and samples of its bytes, or of preset and seed.

    An emulated model has its own: it keeps silence, which no real one may resume.
    """
    digest = hashlib.sha256(b"emulated" if emulated else b"")
    if checkpoint:
        for file in sorted(Path(checkpoint).glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(_samples_of(file))
    else:
        sizes = Path(preset).read_text() if preset.endswith(".json") else preset
        digest.update(f"{sizes} {weights_seed}".encode())
    return digest.hexdigest()


def script_mark(token_ids: Sequence[int], voices: Sequence[int], samples: Mapping[int, np.ndarray]) -> str:
    """A fingerprint of a prompt and of the voice samples in it."""
    digest = hashlib.sha256(np.asarray(token_ids, np.int64).tobytes())
    for voice in voices:
        digest.update(samples[voice].tobytes())
    return digest.hexdigest()


def _samples_of(file: Path) -> bytes:
    size = file.stat().st_size
    with open(file, "rb") as content:
        pieces = []
        for place in (0, size // 3, 2 * size // 3, max(0, size - _SAMPLE_BYTES)):
            content.seek(place)
            pieces.append(content.read(_SAMPLE_BYTES))
    return b"".join(pieces)
