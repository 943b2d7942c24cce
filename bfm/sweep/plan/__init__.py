"""Before a sweep starts: what it will do and cost, and what this machine can do."""
