"""Measures contenders that make clips in turn, each in its own process. `sparsectrl-lcm bench` uses it too."""
