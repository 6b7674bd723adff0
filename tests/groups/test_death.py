"""A member dies, after all other tests: see `groups.member.die`."""

import json

from groups.member import MEMBERS, TIMEOUT


def test_a_member_that_dies(gloo):
    """The others get gloo's own error, long before its timeout, and their state is as before."""
    folder, printed = gloo
    for rank in range(MEMBERS - 1):
        file = folder / f"death-{rank}.json"
        assert file.exists(), printed
        outcome = json.loads(file.read_text())
        assert outcome.pop("seconds") < TIMEOUT / 5
        assert outcome == {"raised": "the engine's error", "same": True}, printed
