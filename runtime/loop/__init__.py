"""The mathematics of the LCM loop, as functions of arrays."""
