"""What several benchmarks use: no programs."""
