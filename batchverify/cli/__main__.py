"""`python -m batchverify.cli`."""

from batchverify.cli.app import main

main()
