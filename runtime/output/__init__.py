"""From frames to files."""
