"""The LCM loop's mathematics, as functions over arrays."""
