import pytest

from cbtm_pipeline.base.duration import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.9, "0.9s"),
        (3.21, "3.2s"),
        (59, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (172799, "47h59m"),
        (172800, "2d00h"),
        (25_948_800, "300d08h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
