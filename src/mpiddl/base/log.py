"""The one logger of the library. Messages carry the rank; what is shown is the user's choice."""

from __future__ import annotations

import logging

__all__ = ["logger", "name_rank", "speaks"]

logger = logging.getLogger("mpiddl")


class _RankFilter(logging.Filter):
    """Puts the rank in front, so that lines of many ranks can be told apart."""

    rank: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        if self.rank is not None:
            record.msg = f"mpiddl rank {self.rank}: {record.msg}"
        return True


_filter = _RankFilter()
logger.addFilter(_filter)


def name_rank(rank: int | None) -> None:
    """From now on messages are said to come from ``rank``."""
    _filter.rank = rank


def speaks() -> bool:
    """Whether this process says what all ranks could: it is rank 0, or no rank."""
    return not _filter.rank
