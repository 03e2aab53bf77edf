"""`python -m tlens_callback` is `tlens-callback`."""

from tlens_callback.cli import main

if __name__ == "__main__":
    main(prog_name="tlens-callback")
