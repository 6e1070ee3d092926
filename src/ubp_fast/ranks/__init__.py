"""Processes that work as one, of one machine or of several: how they find one another, and whose files they read."""
