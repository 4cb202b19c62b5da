from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from autocompress.bank.lru import ByteLru


def test_what_was_used_longest_ago_goes_first():
    lru = ByteLru(10, len)
    for key in "abc":
        lru.put(key, key * 3)
    assert lru.get("a") == "aaa"
    lru.put("d", "dddd")
    assert [lru.get(k) for k in "abcd"] == ["aaa", None, "ccc", "dddd"]


def test_a_value_above_the_bound_is_not_kept():
    lru = ByteLru(4, len)
    lru.put("a", "aa")
    lru.put("b", "bbbbb")
    assert (lru.get("a"), lru.get("b"), lru.n_bytes) == ("aa", None, 2)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 7)))),
    st.integers(0, 12),
)
def test_it_agrees_with_a_naive_cache(operations, capacity):
    lru = ByteLru(capacity, len)
    naive = OrderedDict()
    for key, size in operations:
        if size is None:
            if key in naive:
                naive.move_to_end(key)
            assert lru.get(key) == naive.get(key)
            continue
        lru.put(key, "x" * size)
        naive.pop(key, None)
        if size <= capacity:
            naive[key] = "x" * size
        while sum(map(len, naive.values())) > capacity:
            naive.popitem(last=False)
    assert lru.n_bytes == sum(map(len, naive.values())) <= capacity
    assert len(lru) == len(naive)
