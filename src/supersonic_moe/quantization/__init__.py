"""Block formats of FP8 tensors, and how long a quantised weight may be used."""
