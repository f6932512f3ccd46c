"""Owners of content keys: what a Python dict says."""

import random

import pytest

from batchverify.owners import Owners


@pytest.mark.parametrize("seed", range(5))
def test_owners_are_those_of_a_dict(seed):
    generator, count = random.Random(seed), 300
    # Many want one place, some differ in the kept half's last byte alone, some hold zeros.
    keys = [
        bytes([generator.randrange(3)]) + bytes(14) + bytes([at % 256]) + generator.randbytes(16)
        if at % 2
        else generator.randbytes(32)
        for at in range(count)
    ]
    keys = list({key[:16]: key for key in keys}.values())
    owners, slow = Owners(len(keys)), {}
    for _ in range(6000):
        at = generator.randrange(len(keys))
        key = keys[at]
        assert owners.get(key) == slow.get(key, -1)
        if generator.random() < 0.2:
            owners.drop(key)
            slow.pop(key, None)
        elif key not in slow:
            owners.put(key, at)
            slow[key] = at
    assert [owners.get(key) for key in keys] == [slow.get(key, -1) for key in keys]


def test_another_image_may_own_a_key_that_was_dropped():
    owners, keys = Owners(3), [bytes([1]) * 32, bytes([1]) * 8 + bytes(24)]
    owners.put(keys[0], 2)
    owners.put(keys[1], 0)
    owners.drop(keys[0])
    assert [owners.get(key) for key in keys] == [-1, 0]
    owners.put(keys[0], 1)
    assert [owners.get(key) for key in keys] == [1, 0]


def test_a_run_without_images_has_no_owners():
    assert Owners(0).get(bytes(32)) == -1
