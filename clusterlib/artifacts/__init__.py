"""Settings, storage, tables, and the artifacts that hold them."""
