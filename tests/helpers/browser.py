"""A real browser for tests of pages: Debian's Chromium."""

import os
import shutil
import subprocess

import pytest


def chromium() -> str:
    """The program; installed with apt-get where that is possible."""
    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            apt = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10", *command]
            subprocess.run(apt, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
    return shutil.which("chromium") or pytest.skip("chromium is not installed and apt-get did not install it")
