"""From shards to batches: the order, the augmentation, the cache and the stream, and resizing."""
