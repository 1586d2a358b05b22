"""Measuring: contenders that make clips in turn, each in a process of its own; `sparsectrl-lcm bench` uses it too."""
