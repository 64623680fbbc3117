"""``python -m supersonic_moe`` is the command line, installed or not."""

from supersonic_moe.cli import main

if __name__ == "__main__":
    main()
