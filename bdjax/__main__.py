"""`bdjax` and `python -m bdjax` are the command line."""

from bdjax.cli import _large_pages


def main() -> None:
    """Run one command in this process (:func:`bdjax.cli.main`)."""
    _large_pages.restart_with_large_pages()
    from bdjax.cli import main as run  # noqa: PLC0415, after what may begin the process anew

    run()


if __name__ == "__main__":
    main()
