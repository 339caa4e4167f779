"""Secret sharing over its field."""

import numpy as np
import pytest

from fedpilot.errors import SecureSumError
from fedpilot.privacy import shamir


def test_shamir_needs_the_threshold_and_any_of_them_do() -> None:
    secret = bytes(range(224, 256))
    shares = shamir.split(secret, 4, range(1, 8), np.random.default_rng(0).bytes)
    for points in ((1, 2, 3, 4), (7, 2, 5, 1), (1, 2, 3, 4, 5, 6, 7)):
        assert shamir.combined({point: shares[point] for point in points}, 4) == secret
    with pytest.raises(SecureSumError, match="must have 4 shares, got 3"):
        shamir.combined({point: shares[point] for point in (1, 2, 3)}, 4)
    assert shamir.combined({point: shares[point] for point in (1, 2, 3)}, 3) != secret


def test_the_fields_order_is_a_prime() -> None:
    prime = shamir.PRIME  # Miller and Rabin: no base is a witness against it
    odd, twos = prime - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 60):
        x = pow(base, odd, prime)
        assert x in (1, prime - 1) or any(pow(x, 2**i, prime) == prime - 1 for i in range(1, twos))
    assert prime > 2**256
