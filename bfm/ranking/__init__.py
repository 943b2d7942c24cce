"""Full-catalogue metrics, their brute force-checked core, and the floors to beat."""
