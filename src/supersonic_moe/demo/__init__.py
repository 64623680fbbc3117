"""The demo: a byte-level Mixture-of-Experts language model, trained in minutes on text that every machine has.

Read it in this order: :mod:`.data` (the text, its split, the bigram to beat), :mod:`.model` (the transformer),
:mod:`.train` (the run), :mod:`.report` (what it shows).
"""
