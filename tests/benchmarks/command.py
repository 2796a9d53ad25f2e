"""What all benchmarks understand: --smallest, with which they come to their RESULT line in
seconds.
"""

from __future__ import annotations

import argparse
from types import ModuleType


def parse(parser: argparse.ArgumentParser, **smallest: object) -> argparse.Namespace:
    """The options of the command line.

    Args:
        smallest: what stands for the parser's defaults under --smallest.
    """
    parser.add_argument(
        "--smallest", action="store_true", help="made-up data and little of it: does it still run?"
    )
    if parser.parse_known_args()[0].smallest:
        parser.set_defaults(**smallest)
    return parser.parse_args()


def data(options: argparse.Namespace) -> ModuleType:
    """The module that gives texts, vectors and a teacher: real.py, or under --smallest
    made_up.py.
    """
    if options.smallest:
        import made_up

        return made_up
    import real

    return real
