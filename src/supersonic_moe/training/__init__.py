"""Dataflow of forward and backward of the experts: one readable list of kernel calls each."""
