"""Sources of events: each is a frozen dataclass whose `prepare` writes the canonical event directory."""
