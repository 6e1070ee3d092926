from __future__ import annotations

import numpy as np

from ubp_fast.store.vocabulary import PAD, UNKNOWN, encode, vocabulary


def test_real_ids_start_at_two_in_ascending_order() -> None:
    known = vocabulary(np.array([2**62, -5, 7]))
    assert known.tolist() == [-1, -1, -5, 7, 2**62]
    ids = np.array([2**62, -5, 7, 7])
    dense = encode(ids, known)
    assert dense.dtype == np.int32
    assert dense.tolist() == [4, 2, 3, 3]
    assert (known[dense] == ids).all()


def test_other_ids_are_unknown() -> None:
    known = vocabulary(np.array([7]))
    assert encode(np.array([8, 6, 9, -1, 7]), known).tolist() == [UNKNOWN] * 4 + [2]


def test_an_id_of_minus_one_is_a_real_id() -> None:
    assert encode(np.array([-1, 3]), vocabulary(np.array([-1]))).tolist() == [2, UNKNOWN]


def test_empty_vocabulary() -> None:
    known = vocabulary(np.empty(0, np.int64))
    assert known.tolist() == [-1, -1]
    assert PAD == 0
    assert encode(np.array([1]), known).tolist() == [UNKNOWN]
    assert encode(np.empty(0, np.int64), known).shape == (0,)
