"""The cryptography that privacy needs, all of it from the package cryptography: keys, agreement, sealing, streams."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedpilot.errors import PlanError, SecureSumError

Random: TypeAlias = Callable[[int], bytes]
"""Gives so many secret random bytes."""

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16


@dataclass(frozen=True)
class _Primitives:
    """What is used of the package cryptography."""

    algorithms: Any
    Cipher: Any
    x25519: Any
    AESGCM: Any
    HKDF: Any
    SHA256: Any
    InvalidTag: type[Exception]


def _primitives() -> _Primitives:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise PlanError(
            f"secure aggregation needs the package cryptography, got {error}; pip install 'fedpilot[flower]'"
        ) from error
    return _Primitives(algorithms, Cipher, x25519, AESGCM, HKDF, SHA256, InvalidTag)


def check_installed() -> None:
    """Looks for the package.

    Raises:
        PlanError: It is not installed.
    """
    _primitives()


def public_key(private: bytes) -> bytes:
    """X25519's public key of a private one."""
    key: bytes = _primitives().x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return key


def agreed(private: bytes, public: bytes) -> bytes:
    """X25519 of one's private key and the other's public one.

    Raises:
        SecureSumError: The public key is none, or one that would give a known secret.
    """
    x25519 = _primitives().x25519
    try:
        other = x25519.X25519PublicKey.from_public_bytes(public)
        secret: bytes = x25519.X25519PrivateKey.from_private_bytes(private).exchange(other)
    except ValueError as error:
        raise SecureSumError(f"a public key must be one of X25519, got {error}; drop its client") from error
    return secret


def derived(secret: bytes, purpose: str) -> bytes:
    """HKDF-SHA256 to a key for one purpose."""
    kit = _primitives()
    key: bytes = kit.HKDF(algorithm=kit.SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(secret)
    return key


class Stream:
    """ChaCha20's key stream. A key is used for one stream, so its nonce may be zero."""

    def __init__(self, key: bytes) -> None:
        kit = _primitives()
        self._encryptor = kit.Cipher(kit.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def read(self, count: int) -> bytes:
        """The next bytes."""
        found: bytes = self._encryptor.update(bytes(count))
        return found


def sealed(key: bytes, text: bytes, address: bytes, random: Random) -> bytes:
    """AES-256-GCM; the address is bound to the text."""
    nonce = random(NONCE_BYTES)
    result: bytes = nonce + _primitives().AESGCM(key).encrypt(nonce, text, address)
    return result


def opened(key: bytes, letter: bytes, address: bytes, text_bytes: int) -> bytes:
    """The text of a sealed letter.

    Raises:
        SecureSumError: It has another length, or was altered, or is for another address.
    """
    kit = _primitives()
    expected = NONCE_BYTES + text_bytes + TAG_BYTES
    if len(letter) != expected:
        raise SecureSumError(f"a letter must have {expected} bytes, got {len(letter)}; refuse it")
    try:
        text: bytes = kit.AESGCM(key).decrypt(letter[:NONCE_BYTES], letter[NONCE_BYTES:], address)
    except kit.InvalidTag as error:
        raise SecureSumError(f"a letter ({address.decode()}) must be whole, got one that is not; refuse it") from error
    return text
