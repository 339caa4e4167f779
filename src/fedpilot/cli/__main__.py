"""``python -m fedpilot.cli``."""

from fedpilot.cli import main

if __name__ == "__main__":
    main()
