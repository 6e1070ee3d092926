"""Event logs: what they look like, where they come from, how time is split."""
