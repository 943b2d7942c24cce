"""What happened: segments, the state that they add up to, and what a sweep that goes on may change."""
