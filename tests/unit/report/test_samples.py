"""Which steps of a rollout log a page shows."""

from megatron_qlrl.report.samples import spread


def test_spread_begins_with_the_ends_and_halves_the_gaps() -> None:
    assert list(spread(9)) == [8, 0, 4, 2, 6, 1, 3, 5, 7]
    assert [list(spread(count)) for count in range(4)] == [[], [0], [1, 0], [2, 0, 1]]


def test_spread_names_every_index_once() -> None:
    for count in range(40):
        assert sorted(spread(count)) == list(range(count))
