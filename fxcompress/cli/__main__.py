"""``python -m fxcompress.cli``."""

from fxcompress.cli.main import main

if __name__ == "__main__":
    main()
