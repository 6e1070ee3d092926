"""The event store: client-sorted, memory-mapped columns of everything before a cutoff."""
