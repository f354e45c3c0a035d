"""Names and numbers of profiles."""

import pytest

from kvtc import profiles
from kvtc.container.tables import PROFILE_NAMES, PROFILES
from kvtc.errors import InvalidArgument
from kvtc.profiles.lossless import LosslessProfile


@pytest.mark.parametrize(("name", "number"), [("a", 1), ("a", 4), ("joint", 9), ("lossless", 9), ("a", 0), ("a", 256)])
def test_names_and_numbers_of_profiles_are_their_own(name: str, number: int) -> None:
    before = dict(PROFILES), dict(PROFILE_NAMES)
    with pytest.raises(InvalidArgument, match=rf"the profile {name} with number {number}; expected .*lossless \(4\)"):
        profiles.register(name, number, LosslessProfile)
    assert before == (PROFILES, PROFILE_NAMES)
