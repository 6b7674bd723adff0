"""What crashed, went wrong silently or was left half done, once: each with what was done to it."""

import os
import subprocess
import sys
import textwrap


def survives(code, **environment):
    """The code ends without an error in a process of its own, which it may kill; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout
