"""``python -m fxcompress`` is the command line."""

from fxcompress.cli import main

if __name__ == "__main__":
    main()
