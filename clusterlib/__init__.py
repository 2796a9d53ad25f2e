"""Clusters, shards and batch plans: what runs without Ray, DeepSpeed or a GPU."""
