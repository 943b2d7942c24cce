"""Event logs to packed windows: schema, fields, shards, groups of windows, the evaluation protocol."""
