"""The command line. One file per command; ``app`` puts them together and ``options`` turns text into arguments."""
