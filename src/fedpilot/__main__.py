"""``python -m fedpilot``: the command line."""

from fedpilot.cli import main

if __name__ == "__main__":
    main()
