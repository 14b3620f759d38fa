"""Ed25519 signatures of ``signoff.json`` in OpenSSH's format: made and verified here, or by ``ssh-keygen -Y``.

The format is PROTOCOL.sshsig of OpenSSH. On a machine without the harness,
``ssh-keygen -Y check-novalidate -n speech-signoff -s signoff.json.sig < signoff.json`` checks that it is unchanged, and
``ssh-keygen -Y verify`` with a file of allowed signers checks who signed it.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import textwrap
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from harness.errors import InputError
from harness.records.store import replace_text
from harness.report.facts import SEAL_NAME, SIGNATURE_NAME

NAMESPACE = b"speech-signoff"
_MAGIC, _VERSION, _KIND, _HASH = b"SSHSIG", 1, b"ssh-ed25519", b"sha512"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"


def sign_seal(folder: Path, key: Path) -> Path:
    """Sign the seal of a finished run with an OpenSSH private key without a passphrase; returns the signature's path.

    Raises InputError for a key that cannot be used.
    """
    private = _private_key(key)
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = private.sign(_signed((folder / SEAL_NAME).read_bytes()))
    blob = b"".join(
        [_MAGIC, struct.pack(">I", _VERSION), _string(_public_blob(raw)), _string(NAMESPACE), _string(b"")]
        + [_string(_HASH), _string(_string(_KIND) + _string(signature))]
    )
    body = "\n".join(textwrap.wrap(base64.b64encode(blob).decode(), 70))
    path = folder / SIGNATURE_NAME
    replace_text(path, f"{_BEGIN}\n{body}\n{_END}\n")
    return path


def check_private_key(path: Path) -> None:
    """Raise InputError for a key that cannot sign."""
    _private_key(path)


def problem_of_signature(folder: Path, public: Path) -> str:
    """Why a run's signature was not made by this public key; "" if it was. Raises InputError for an unusable key."""
    key = _public_key(public)
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    try:
        text = (folder / SIGNATURE_NAME).read_text()
        signer, signature = _parsed(text)
        if signer != _public_blob(raw):
            return f"{SIGNATURE_NAME} was made by another key than {public}"
        key.verify(signature, _signed((folder / SEAL_NAME).read_bytes()))
    except OSError as error:
        return f"{error.filename}: {error.strerror}: not signed with a key; sign with `harness signoff PLAN --sign KEY`"
    except InvalidSignature:
        return f"{SEAL_NAME} is not what was signed with this key"
    except (ValueError, struct.error):
        return f"{SIGNATURE_NAME} is damaged"
    return ""


def _signed(message: bytes) -> bytes:
    """The bytes that are signed: the hash of the message with its namespace."""
    return b"".join([_MAGIC, *map(_string, (NAMESPACE, b"", _HASH, hashlib.sha512(message).digest()))])


def _string(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def _public_blob(raw: bytes) -> bytes:
    return _string(_KIND) + _string(raw)


def _parsed(text: str) -> tuple[bytes, bytes]:
    """Parse the signer's public key (as in a key file) and the signature. Raises ValueError or struct.error."""
    if not (text.startswith(_BEGIN) and text.rstrip().endswith(_END)):
        raise ValueError("not armoured")
    body = text.strip().removeprefix(_BEGIN).removesuffix(_END)
    blob = base64.b64decode("".join(body.split()), validate=True)
    if blob[:6] != _MAGIC or struct.unpack(">I", blob[6:10])[0] != _VERSION:
        raise ValueError("another format")
    signer, namespace, _, hashed, signature = _strings(blob[10:], 5)
    if (namespace, hashed) != (NAMESPACE, _HASH):
        raise ValueError("of something else")
    kind, value = _strings(signature, 2)
    if kind != _KIND:
        raise ValueError("another algorithm")
    return signer, value


def _strings(blob: bytes, count: int) -> list[bytes]:
    found = []
    for _ in range(count):
        (length,) = struct.unpack(">I", blob[:4])
        if len(blob) < 4 + length:
            raise ValueError("cut off")
        found.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    if blob:
        raise ValueError("trailing bytes")
    return found


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_ssh_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        words = "it has a passphrase" if "password" in str(error).lower() else "it is not an OpenSSH private key"
        raise InputError(f"{path}: {words}: give one made by `ssh-keygen -t ed25519 -N '' -f KEY`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key: make one with `ssh-keygen -t ed25519 -N '' -f KEY`")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = load_ssh_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path} is not an OpenSSH public key: give the KEY.pub beside the private one") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} is not an Ed25519 key: give the KEY.pub of `ssh-keygen -t ed25519`")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
