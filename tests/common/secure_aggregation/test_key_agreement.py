"""Keys of one sum: equal for both sites of a pair, and of no use in any other sum, direction or pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.errors import SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import (
    KeyPair,
    agree,
    commit,
    encrypt_for,
    own_mask,
    pair_mask,
    sign_keys,
    unseal,
)
from pneumofed.common.secure_aggregation.protocol import SignedKeys, SumSession

SESSION = SumSession("run", 3, "train", "ab" * 16, "settings")
OTHERS = [
    replace(SESSION, run="other"),
    replace(SESSION, round=4),
    replace(SESSION, purpose="evaluate"),
    replace(SESSION, identifier="cd" * 16),
    replace(SESSION, settings="others"),
]
NODE_KEY = ec.generate_private_key(ec.SECP384R1())


def site(name: str) -> tuple[KeyPair, KeyPair, SignedKeys]:
    channel, mask = KeyPair.generate(), KeyPair.generate()
    return channel, mask, sign_keys(SESSION, name, channel.public, mask.public, NODE_KEY)


def test_two_sites_have_one_mask_which_one_adds_and_the_other_subtracts() -> None:
    (_, mask_a, keys_a), (_, mask_b, keys_b) = site("alpha"), site("beta")
    key, subtracts = pair_mask(SESSION, mask_a.private, keys_a, keys_b, "model")
    other, other_subtracts = pair_mask(SESSION, mask_b.private, keys_b, keys_a, "model")
    assert (key, subtracts, other_subtracts) == (other, False, True)


def test_masks_about_different_weights_are_different() -> None:
    (_, mask, keys_a), (*_, keys_b) = site("alpha"), site("beta")
    keys = {pair_mask(SESSION, mask.private, keys_a, keys_b, model)[0] for model in ("model", "other")}
    assert len(keys) == 2


@pytest.mark.parametrize("other", OTHERS)
def test_no_key_serves_in_another_sum(other: SumSession) -> None:
    (_, mask, keys_a), (*_, keys_b) = site("alpha"), site("beta")
    assert (
        pair_mask(SESSION, mask.private, keys_a, keys_b, "model")[0] != pair_mask(other, mask.private, keys_a, keys_b, "model")[0]
    )
    assert own_mask(SESSION, bytes(32), "alpha") != own_mask(other, bytes(32), "alpha")
    assert own_mask(SESSION, bytes(32), "alpha").hex() != commit(SESSION, bytes(32), "alpha")


def test_a_parcel_opens_for_its_receiver_alone() -> None:
    (channel_a, _, keys_a), (channel_b, _, keys_b), (channel_c, _, keys_c) = site("alpha"), site("beta"), site("gamma")
    parcel = encrypt_for(SESSION, channel_a.private, keys_a, keys_b, b"shares")
    assert unseal(SESSION, channel_b.private, keys_a, keys_b, parcel) == b"shares"
    for session, private, sender, receiver, content in (
        (SESSION, channel_c.private, keys_a, keys_c, parcel),
        (SESSION, channel_b.private, keys_c, keys_b, parcel),
        (SESSION, channel_a.private, keys_b, keys_a, parcel),
        (OTHERS[0], channel_b.private, keys_a, keys_b, parcel),
        (SESSION, channel_b.private, keys_a, keys_b, parcel[:-1] + bytes([parcel[-1] ^ 1])),
        (SESSION, channel_b.private, keys_a, keys_b, parcel[:5]),
    ):
        with pytest.raises(SecureSumError):
            unseal(session, private, sender, receiver, content)


def test_a_public_key_that_gives_everyone_the_same_secret_is_refused() -> None:
    with pytest.raises(SecureSumError, match="no key"):
        agree(KeyPair.generate().private, bytes(32))


@given(first=st.lists(st.binary(max_size=5), max_size=4), second=st.lists(st.binary(max_size=5), max_size=4))
def test_different_parts_never_give_the_same_bytes(first: list[bytes], second: list[bytes]) -> None:
    assert (SESSION.bind("label", *first) == SESSION.bind("label", *second)) == (first == second)
