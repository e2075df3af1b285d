import pytest

from megatron_qlrl.policy.offload import pieces

MIB = 2**20


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (1, [1]),
        (MIB, [1]),
        (MIB + 1, [2]),
        (620 * MIB, [512, 64, 32, 8, 4]),
        (62_000 * 5_120 * 2, [512, 64, 16, 8, 4, 2]),  # 605.5 MiB: a layer of a 32B model
        (1024 * MIB, [1024]),
    ],
)
def test_pieces_are_powers_of_two_and_no_larger_than_needed(
    num_bytes: int, expected: list[int]
) -> None:
    assert pieces(num_bytes) == [size * MIB for size in expected]
