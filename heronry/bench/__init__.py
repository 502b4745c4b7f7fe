"""Benchmarks of this package beside its peers, on the machine at hand: `heronry bench`."""
