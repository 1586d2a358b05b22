"""Python imports this module as it starts, in every program that a test runs."""

from one_thread import compute_with_one_thread

compute_with_one_thread()
