"""The two-part model: event embedder, contextualizer, sizing and exact FLOPs."""
