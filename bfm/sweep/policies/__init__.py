"""What is trained next: which trial goes on, and when a new one is begun."""
