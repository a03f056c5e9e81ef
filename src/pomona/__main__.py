"""``python -m pomona`` is ``pomona``."""

from pomona.cli.main import main

if __name__ == "__main__":
    main()
