"""How a document that is longer than a model's context is read: in windows that overlap."""

from collections.abc import Iterator


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, stop) for each window of a document with `n_tokens` tokens.

    The model reads inputs start ... stop - 1; the predictions of inputs first ... stop - 1 are scored. Input
    t predicts token x_t, t < n_tokens; input 0 is the separator. Every token is scored exactly once. No
    window has more than `context` inputs. A token is predicted from at least context - stride + 1 inputs (the
    separator counts), or from all inputs before it if there are fewer.
    """
    first, stop = 0, min(n_tokens, context)
    while first < stop:
        yield max(0, stop - context), first, stop
        first, stop = stop, min(n_tokens, stop + stride)
