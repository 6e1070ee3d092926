"""Features of clients at a cutoff: one row of named numbers per client that needs a profile.

    organisers/    the organisers' counts, from the store or straight from the tables of events
    aggregated.py  counts of popular values, distinct items, mean prices, active days per window, recency
    decayed.py     log1p of exponentially decayed counts per label, activity at several half-lives, recency
    static.py      the 46 summary numbers of the winner's multi-task model
    rich/          what the strongest systems added, as declared blocks

All read only events before the cutoff, lists of popular values included, and work in blocks of clients.
"""
