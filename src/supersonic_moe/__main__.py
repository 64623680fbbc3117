"""``python -m supersonic_moe`` is the command line, installed or not."""

from supersonic_moe.cli.app import app

if __name__ == "__main__":
    app(prog_name="supersonic-moe")
