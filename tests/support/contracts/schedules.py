"""The contract of schedules."""

from contracts.base import Contract


class ScheduleContract(Contract):
    """The contract of schedules: shares in [0, 1] that depend only on the step."""

    def test_is_a_pure_function(self, make):
        first, second = make(), make()
        forward = [first.density(step) for step in range(60)]
        assert forward[::-1] == [second.density(step) for step in range(59, -1, -1)]
        assert vars(first) == vars(make())

    def test_is_a_share(self, make):
        assert all(0 <= make().density(step) <= 1 for step in (0, 1, 39, 40, 41, 10**9))
