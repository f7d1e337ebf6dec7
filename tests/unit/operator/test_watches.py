"""What kopf is told of watches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from tandem_operator.watch import Feed


def test_a_watch_that_is_refused_is_tried_again_without_end() -> None:
    feed = Feed(cast(Any, SimpleNamespace(budget=None)), ())
    pauses = cast(Iterable[float], feed.settings().networking.error_backoffs)
    for _ in range(2):  # it is asked anew for each request
        assert list(itertools.islice(pauses, 20))[-3:] == [5, 5, 5]
