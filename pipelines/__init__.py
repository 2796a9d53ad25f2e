"""The stages: each reads one artifact and writes one, and `run` chains them."""
