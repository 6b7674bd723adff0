"""The lock of every change to a state, and its renewal in a forked child."""

import os
import threading

#: Held for nothing but the comparison and the swap of a state's arrays, or the writes in place to a torch module's. One
#: lock for all states can be renewed in a forked child, where the thread that held it does not exist.
commits = threading.RLock()


def _renew() -> None:
    global commits
    commits = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
