"""Children forked from the tests: they import nothing again, and whatever is done to them ends with them."""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress

import eectl.training.train  # noqa: F401  # and with it torch: no child has to import it
from eectl.cli import app as cli


def start_child(*arguments, said, **variables):
    """Run the program in a child; its number. Files and variables as in `fork`."""

    def act():
        sys.argv = ["eectl", *map(str, arguments)]
        cli.main()

    return fork(act, said=said, **variables)


def fork(act, *, said, **variables):
    """Start a child that acts; its number. What it prints is added to the file `said`; `variables` go into its environment."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        with open(said, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for handle in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {"NO_COLOR": "1", "COLUMNS": "200"} | variables
        act()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # a child must never go on with what its parent does
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(number, *, within=100.0):
    """The code that a child ends with, minus a signal's number where one ended it; None, and it is killed, after `within` s."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    kill(number)
    return None


def kill(number):
    """Kill a child and wait for its end."""
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
