"""One loop, two engines, engine-neutral checkpoints."""
