"""Pages of a large prefix: in order, complete, in parallel, with few requests."""

from __future__ import annotations

import threading
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.storage import s3_pages
from dist_ft.storage.s3_pages import S3Object, iter_objects


class Bucket:
    """A listing as S3 gives it, in the order of the UTF-8 bytes."""

    def __init__(self, keys):
        self.keys = sorted(keys, key=str.encode)
        self.encoded = [key.encode() for key in self.keys]
        self.num_requests = 0
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def list_page(self, prefix, after, count):
        with self.lock:
            self.num_requests += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        start = bisect_right(self.encoded, after.encode()) if after else 0
        found = []
        for key in self.keys[start:]:
            if key.startswith(prefix):
                found.append(S3Object(key, len(key), "e"))
            elif found:
                break
            if len(found) == count:
                break
        with self.lock:
            self.running -= 1
        return found


def listed(bucket, prefix=""):
    return [item.key for page in iter_objects(bucket.list_page, prefix) for item in page]


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 30_000])
def test_all_keys_come_in_order(count):
    bucket = Bucket([f"data/part-{number:07d}.jsonl" for number in range(count)] + ["other/x"])
    assert listed(bucket, "data/") == bucket.keys[:count]


def test_parts_are_listed_at_the_same_time_with_few_requests_more():
    bucket = Bucket([f"data/part-{number:07d}.jsonl" for number in range(100_000)])
    assert listed(bucket, "data/") == bucket.keys
    assert bucket.num_requests < 100 + 300
    assert bucket.most_running > 1


alphabets = st.sampled_from(["ab", "a/b-", "0123456789", "aé𝄞~", " \x1f!z"])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), alphabet=alphabets, page=st.integers(1, 9))
def test_any_keys_come_once_and_in_order(data, alphabet, page):
    texts = st.text(st.sampled_from(alphabet), min_size=1, max_size=8)
    keys = data.draw(st.sets(texts, max_size=120))
    prefix = data.draw(st.sampled_from(["", alphabet[0]]))
    bucket = Bucket(keys)
    before = s3_pages.PAGE_KEYS, s3_pages.MAX_PAGES_IN_TURN
    s3_pages.PAGE_KEYS, s3_pages.MAX_PAGES_IN_TURN = page, 2
    try:
        assert listed(bucket, prefix) == [key for key in bucket.keys if key.startswith(prefix)]
    finally:
        s3_pages.PAGE_KEYS, s3_pages.MAX_PAGES_IN_TURN = before


def test_an_error_of_a_page_is_raised():
    bucket = Bucket([f"{number:05d}" for number in range(5000)])

    def failing(prefix, after, count):
        if after > "03":
            raise OSError("no answer")
        return bucket.list_page(prefix, after, count)

    with pytest.raises(OSError, match="no answer"):
        list(iter_objects(failing, ""))
