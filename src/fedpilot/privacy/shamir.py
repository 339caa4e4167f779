"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer say nothing of it.

Shamir, "How to Share a Secret", 1979. The secret is the value at 0 of a random polynomial of degree threshold - 1 over
the field of integers modulo `PRIME`; a share is its value elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping

from fedpilot.errors import SecureSumError

PRIME = 2**256 + 297
"""The smallest prime above every 32-byte secret."""

SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Iterable[int], random: Callable[[int], bytes]) -> dict[int, bytes]:
    """A share for each point.

    Args:
        secret: 32 bytes.
        threshold: Shares that give it back.
        points: Distinct numbers from 1.
        random: Gives so many random bytes.
    """
    coefficients = [int.from_bytes(secret), *(int.from_bytes(random(64)) % PRIME for _ in range(threshold - 1))]

    def value(point: int) -> int:
        result = 0
        for coefficient in reversed(coefficients):
            result = (result * point + coefficient) % PRIME
        return result

    return {point: value(point).to_bytes(SHARE_BYTES) for point in points}


def combined(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the first ``threshold`` shares: Lagrange interpolation at 0.

    >>> parts = split(b"k" * 32, 2, [1, 5, 9], lambda count: b"x" * count)
    >>> combined({5: parts[5], 9: parts[9]}, 2) == b"k" * 32
    True

    Raises:
        SecureSumError: There are too few shares, or they are not of one secret.
    """
    if len(shares) < threshold:
        raise SecureSumError(f"a secret must have {threshold} shares, got {len(shares)}; too many clients have left")
    used = {point: int.from_bytes(shares[point]) for point in sorted(shares)[:threshold]}
    secret = 0
    for point, share in used.items():
        factor = 1
        for other in used:
            if other != point:
                factor = factor * other * pow(other - point, -1, PRIME) % PRIME
        secret = (secret + share * factor) % PRIME
    if secret >= 2**256:
        raise SecureSumError("shares must be of one secret, got some that are not; a client or the server altered one")
    return secret.to_bytes(SECRET_BYTES)
