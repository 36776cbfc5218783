"""Which positions a tracking answer has (data.md 6.5).

track           every visible position on the sampling grid
ground          the first and the last visible position of each object
single_point    of one object, what `track` has after the time at which the prompt shows it
"""

from __future__ import annotations

import dataclasses

from molmo2core.annotations import Track, Tracking, TrackPosition, on_sampling_grid


def answered_tracks(tracking: Tracking, query: int = 0) -> tuple[Track, ...]:
    """Tracks with the positions that the answer prints; objects without any are left out.

    Args:
        tracking: the annotation.
        query: of `single_point`: which visible position the prompt shows, from 0.
    """
    answered = []
    for track in tracking.tracks:
        seen = visible_positions(track)
        if tracking.form == "ground":
            kept = (seen[0], seen[-1])[: len(seen)] if seen else ()
        else:
            shown = query_position(tracking, query)
            start = shown.time if tracking.form == "single_point" and shown else None
            kept = tuple(
                position
                for position in seen
                if on_sampling_grid(position.time, tracking.sampling_fps) and (start is None or position.time > start)
            )
        if kept:
            answered.append(dataclasses.replace(track, positions=kept))
    return tuple(answered)


def num_queries(tracking: Tracking) -> int:
    """How many of the first visible positions of the first track can be shown so that the answer has a position."""
    seen = visible_positions(tracking.tracks[0]) if tracking.tracks else ()
    last = max((p.time for p in seen if on_sampling_grid(p.time, tracking.sampling_fps)), default=-1.0)
    return sum(position.time < last for position in seen)


def query_position(tracking: Tracking, query: int = 0) -> TrackPosition | None:
    """The visible position number `query` of the first track; None if it has no such position."""
    seen = visible_positions(tracking.tracks[0]) if tracking.tracks else ()
    return seen[query] if query < len(seen) else None


def visible_positions(track: Track) -> tuple[TrackPosition, ...]:
    """Where the object can be seen."""
    return tuple(position for position in track.positions if position.visible)
