"""``python -m mpiddl`` is the same as ``mpiddl``."""

from mpiddl.cli.main import main

main()
