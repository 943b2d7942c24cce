"""What may be tried and what it costs: the YAML, the feasible set, FLOPs and memory."""
