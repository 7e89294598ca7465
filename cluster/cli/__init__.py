"""The command line: translate between a terminal and the deployment. Decides nothing itself.

Commands import what they need when they run, so that `paceline --help` and `status` are quick.
"""

import sys


def main() -> None:
    """Run `paceline`; exits 1 with the message of a PacelineError, without a traceback."""
    from paceline.cluster.cli.app import app
    from paceline.errors import PacelineError

    try:
        app(prog_name="paceline")
    except PacelineError as error:
        from paceline.cluster.cli.output import print_error

        print_error(str(error))
        sys.exit(1)
