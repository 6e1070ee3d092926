"""One row of named numbers per client: counts, recency, decayed interests."""
