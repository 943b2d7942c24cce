"""A sweep as it runs: tasks out, rows in, requests, how it stands."""
