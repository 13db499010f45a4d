"""Where the n segments of a buffer, and the chunks of a segment, start and end."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["chunked", "split"]


def split(length: int, parts: int) -> list[slice]:
    """``parts`` consecutive slices of ``range(length)`` whose lengths differ by at most one.

    The longer ones come first; with fewer elements than parts the last slices are empty.
    """
    short, longer = divmod(length, parts)
    starts = [part * short + min(part, longer) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def chunked(segment: slice, chunk_length: int, num_chunks: int = 0) -> list[slice]:
    """Slices of at most ``chunk_length`` elements that cover ``segment`` in order.

    Args:
        segment: A slice with start and stop.
        chunk_length: Of the largest chunk, in elements.
        num_chunks: Pads the list with empty slices to this many, so that the chunks of
            segments which differ by one element can be walked in step.
    """
    starts = range(segment.start, segment.stop, chunk_length)
    chunks = [slice(start, min(start + chunk_length, segment.stop)) for start in starts]
    return chunks + [slice(segment.stop, segment.stop)] * (num_chunks - len(chunks))
