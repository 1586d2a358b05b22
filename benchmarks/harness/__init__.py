"""Measuring requests: each contender in a process of its own, answering in turn."""
