"""Who may ask: hosts that only this machine can reach, and keys for all others."""

import hashlib
import hmac
import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host: localhost, 127.0.0.0/8, ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def digest(key: bytes) -> bytes:
    """What is kept of the key to compare others with. All digests have one length."""
    return hashlib.sha256(key).digest()


def fits(key: bytes, expected: bytes) -> bool:
    """Whether this is the key with the digest `expected`. The time it takes says nothing about the key."""
    return hmac.compare_digest(digest(key), expected)
