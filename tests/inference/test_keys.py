"""Which hosts need a key, and which keys fit."""

import pytest

from cbtm_pipeline.inference import keys


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_only_this_machine_needs_no_key(host: str, expected: bool) -> None:
    assert keys.is_loopback(host) is expected


def test_only_the_same_key_fits() -> None:
    expected = keys.digest(b"correct")
    assert keys.fits(b"correct", expected)
    assert not any(keys.fits(key, expected) for key in (b"", b"correc", b"correct ", b"Correct", expected))
