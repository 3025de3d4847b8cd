"""What a check of `cbtm doctor` finds."""

Line = tuple[str, str]  # ok, warn or FAIL, and what was found
