"""One line for whoever watches, on stderr."""

import sys

from align.unseen import printable


def notice(line: str) -> None:
    """Prints it, whatever it quotes of models, servers and files: nothing in it can steer a
    terminal.
    """
    print(printable(line), file=sys.stderr, flush=True)
