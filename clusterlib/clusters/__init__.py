"""k-means of each source, the merge tree of its leaves, and shards sorted by leaf."""
