"""What a check of `cbtm doctor` finds."""

Line = tuple[str, str]  # the level (ok, warn or FAIL), and the finding in words
