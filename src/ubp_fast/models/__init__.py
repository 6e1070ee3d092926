"""Models that turn packed histories and features into one vector per client, and the one place that trains them."""

from __future__ import annotations
