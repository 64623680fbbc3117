"""What a layer computes, described by immutable values: the ground floor, which imports nothing above it."""
