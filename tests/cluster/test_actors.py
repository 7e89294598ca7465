"""What processes under Ray have in common."""

import logging

from paceline.cluster.actors import MAX_LOG_CHARS, BoundedLines


def test_no_log_line_is_longer_than_its_limit_whoever_writes_it() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "said %r", ("x" * 10**6,), None)
    line = BoundedLines("%(levelname)s %(message)s").format(record)
    assert line.startswith("INFO said 'xxx")
    assert line.endswith("characters)")
    assert len(line) < MAX_LOG_CHARS + 100
