from types import SimpleNamespace

import torch

from megatron_qlrl.weights.moments import cuts_of


def test_a_parameter_is_cut_where_the_shares_of_its_bucket_meet() -> None:
    """A bucket of 12 elements that begins at 100 of the buffer, over 3 ranks: 100, 104, 108."""
    bucket = SimpleNamespace(offset=100, grad_data=torch.empty(12))
    assert cuts_of(bucket, 101, 103, num_ranks=3) == {0: (0, 2)}
    assert cuts_of(bucket, 103, 109, num_ranks=3) == {0: (0, 1), 1: (1, 5), 2: (5, 6)}
    assert cuts_of(bucket, 104, 108, num_ranks=3) == {1: (0, 4)}
    assert cuts_of(bucket, 110, 112, num_ranks=3) == {2: (0, 2)}
