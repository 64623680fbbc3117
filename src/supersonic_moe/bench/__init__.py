"""Side-by-side measurements: how to time on a power-capped GPU, what to compare, and how to write it down."""
