"""The stages of lease.py, a module each with `measure(settings, write)`, and how they run."""
