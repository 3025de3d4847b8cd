import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cbtm_pipeline.base import parallel


def test_results_come_in_order_and_few_items_are_taken_ahead() -> None:
    taken, overtaken = [], threading.Event()

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    def function(i: int) -> int:
        if i == 0:
            assert overtaken.wait(10)
        if i == 2:
            overtaken.set()
        return i * i

    with ThreadPoolExecutor(4) as pool:
        results = parallel.in_order(pool, function, items(), 3)
        assert taken == []
        found = []
        for result in results:
            found.append(result)
            assert len(taken) <= len(found) + 3
    assert found == [i * i for i in range(20)]


def test_an_error_comes_out() -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(parallel.in_order(pool, lambda i: 1 // i, [2, 1, 0, 5], 2))
