"""`python -m mooncache` is the `mooncache` command."""

from mooncache.cli import main

main()
