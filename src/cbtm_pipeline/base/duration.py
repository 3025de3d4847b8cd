"""Durations as text for people. Uses the standard library only."""


def duration(seconds: float) -> str:
    """A duration in at most two units: 3.2s, 45s, 1m30s, 3h05m, 2d04h."""
    if seconds < 10:
        return f"{seconds:.2g}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if minutes else f"{s}s"
