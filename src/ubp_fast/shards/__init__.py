"""A run's store, features and profiles by shards of the clients: tasks on files, in this process or on a Ray cluster.

    store      partition (per chunk of a table) -> merge -> build (per shard)
    features   popularity (per shard) -> fit tastes and scorer -> features (per shard)
    profiles   moments -> sums -> fit -> directions -> fit -> embed (per shard) -> publish

Between two steps the driver adds up what the shards have measured, in an order that does not depend on their number:
vectors have the bytes of one pass. What moves between machines is files, written once.
"""
