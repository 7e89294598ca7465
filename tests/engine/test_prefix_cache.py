"""The cache with its allocator: what is found, what is kept, what goes first."""

import numpy as np
import pytest
from opcodes import num_opcodes

from paceline.block_keys import BlockKeys
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import ChainPosition, PrefixCache
from paceline.errors import IntegrityError, OutOfBlocksError
from paceline.request import TokenIds

BLOCK_TOKENS = 4


class Pool:
    """An allocator and a cache, and the life of a sequence on them. A token block is one letter."""

    def __init__(self, num_blocks: int, protected_share: float = 0.8) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.cache = PrefixCache(
            self.allocator, BLOCK_TOKENS, bytes(32), protected_share=protected_share
        )

    def compute(self, text: str, tenant: str = "") -> list[int]:
        """Match, allocate and insert a context of full blocks; the caller releases its blocks."""
        tokens = context(text)
        match = self.cache.match(tokens, tenant, len(tokens))
        num_cached = len(match.block_ids)
        blocks = match.block_ids + self.allocator.allocate(len(text) - num_cached)
        self.insert(text, blocks, match.chain, num_cached)
        return blocks

    def insert(
        self, text: str, blocks: list[int], chain: ChainPosition, start: int = 0
    ) -> ChainPosition:
        for letter, block in zip(text[start:], blocks[start:], strict=True):
            chain = self.cache.insert(chain, context(letter), block)
        return chain

    def visit(self, text: str, tenant: str = "") -> list[int]:
        """Compute a context and release it at once."""
        blocks = self.compute(text, tenant)
        self.allocator.release(blocks)
        self.allocator.check_integrity()
        return blocks

    def num_cached(self, text: str, tenant: str = "") -> int:
        tokens = context(text)
        return self.cache.num_matching_blocks(tokens, tenant, len(tokens))

    def root(self) -> ChainPosition:
        return self.cache.match(context(""), "").chain


def context(text: str, *more: int) -> TokenIds:
    tokens = [ord(letter) * 10 + number for letter in text for number in range(BLOCK_TOKENS)]
    return np.array([*tokens, *more], dtype=np.int32)


def test_computed_prefix_is_found_and_shared() -> None:
    pool = Pool(8)
    blocks = pool.visit("abc")
    match = pool.cache.match(context("abX", 1), "")
    assert match.block_ids == blocks[:2]
    assert [pool.allocator.num_references(block) for block in blocks] == [1, 1, 0]
    pool.allocator.check_integrity()


def test_chain_after_a_match_continues_where_the_match_ended() -> None:
    pool = Pool(8)
    pool.visit("ab")
    blocks = pool.compute("abc")
    assert pool.num_cached("abc") == 3
    assert len(set(blocks)) == 3


def test_at_least_the_last_token_stays_to_be_computed() -> None:
    pool = Pool(8)
    pool.visit("abc")
    assert len(pool.cache.match(context("abc"), "").block_ids) == 2
    assert len(pool.cache.match(context("abc", 1), "").block_ids) == 3
    assert pool.cache.match(context(""), "").block_ids == []


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (3, 0), (4, 1), (11, 2), (12, 3), (13, 3)])
def test_limit_bounds_the_match(limit: int, found: int) -> None:
    pool = Pool(8)
    pool.visit("abc")
    assert len(pool.cache.match(context("abc", 1), "", limit).block_ids) == found


@pytest.mark.parametrize("limit", [-1, 14])
def test_limit_beyond_the_context_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=str(limit)):
        Pool(8).cache.match(context("abc", 1), "", limit)


def test_same_block_after_another_beginning_is_not_found() -> None:
    pool = Pool(8)
    pool.visit("ab")
    assert pool.num_cached("b") == 0
    assert pool.num_cached("xb") == 0


def test_tenants_do_not_share_blocks() -> None:
    pool = Pool(8)
    pool.visit("ab", "alice")
    assert pool.num_cached("ab", "bob") == pool.num_cached("ab") == 0
    assert pool.num_cached("ab", "alice") == 2


def test_contexts_with_equal_keys_do_not_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockKeys, "next_key", lambda self, previous, tokens: previous + b"*")
    pool = Pool(8)
    pool.visit("ab")
    assert pool.num_cached("ax") == 1
    blocks = pool.compute("xb")  # collides in both blocks; nothing of it can be cached
    assert pool.cache.num_cached == 2
    assert pool.num_cached("xb") == 0
    pool.allocator.release(blocks)
    assert pool.num_cached("ab") == 2
    pool.allocator.check_integrity()


def test_equal_tokens_under_a_colliding_parent_are_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The second block's key forgets the first block: only the parent tells "ab" from "xb".
    monkeypatch.setattr(BlockKeys, "next_key", lambda self, previous, tokens: tokens)
    pool = Pool(8)
    pool.visit("ab")
    pool.visit("x")
    assert pool.num_cached("xb") == 1
    pool.visit("xb")
    assert pool.num_cached("xb") == 1
    assert pool.num_cached("ab") == 2


def test_older_block_stays_when_the_same_content_is_computed_twice() -> None:
    pool = Pool(8)
    root = pool.root()
    first, second = pool.allocator.allocate(2), pool.allocator.allocate(2)
    pool.insert("ab", first, root)
    chain = pool.insert("ab", second, root)
    third = pool.allocator.allocate(1)
    pool.insert("c", third, chain)
    pool.allocator.release(first + second + third)
    pool.allocator.check_integrity()
    assert pool.cache.match(context("abc", 1), "").block_ids == [*first, *third]
    assert pool.allocator.num_free == 8 - 3  # the second copies are free


def test_inserting_a_block_again_at_its_own_place_changes_nothing() -> None:
    pool = Pool(8)
    root = pool.root()
    blocks = pool.allocator.allocate(1)
    assert pool.insert("a", blocks, root) == pool.insert("a", blocks, root)
    with pytest.raises(IntegrityError, match="cached already"):
        pool.insert("b", blocks, root)


def test_block_without_reference_cannot_be_inserted() -> None:
    pool = Pool(8)
    blocks = pool.allocator.allocate(1)
    pool.allocator.release(blocks)
    with pytest.raises(IntegrityError, match="0 references"):
        pool.insert("a", blocks, pool.root())


def test_partial_block_cannot_be_inserted() -> None:
    pool = Pool(8)
    with pytest.raises(ValueError, match="4 tokens cannot be cached with 5"):
        pool.cache.insert(pool.root(), context("a", 1), pool.allocator.allocate(1)[0])


def test_nothing_is_evicted_while_the_free_list_suffices() -> None:
    pool = Pool(4)
    pool.visit("ab")
    pool.allocator.allocate(2)
    assert pool.num_cached("ab") == 2
    assert (pool.allocator.num_free, pool.allocator.num_available) == (0, 2)
    pool.allocator.allocate(1)
    assert pool.num_cached("ab") == 1
    assert pool.cache.num_evictions == 1


def test_leaves_go_before_their_parents() -> None:
    pool = Pool(4)
    pool.visit("abcd")
    for num_left in (3, 2, 1, 0):
        pool.allocator.allocate(1)
        assert pool.num_cached("abcd") == num_left
        pool.allocator.check_integrity()


def test_least_recently_used_context_goes_first() -> None:
    pool = Pool(4)
    pool.visit("ab")
    pool.visit("xy")
    pool.visit("ab")
    pool.allocator.allocate(2)
    assert (pool.num_cached("ab"), pool.num_cached("xy")) == (2, 0)


def test_parent_whose_turn_passed_goes_as_soon_as_its_children_have() -> None:
    pool = Pool(4)
    blocks = pool.compute("ab")
    pool.allocator.release(blocks[:1])  # the parent's turn is before its child's
    pool.allocator.release(blocks[1:])
    pool.visit("x")
    pool.allocator.allocate(3)
    assert (pool.num_cached("ab"), pool.num_cached("x")) == (0, 1)
    pool.allocator.check_integrity()


def test_second_hit_protects_a_block_from_newcomers() -> None:
    pool = Pool(4)
    for _ in range(3):  # computed, then two hits
        pool.visit("a")
    for letter in "stuvwxyz":
        pool.visit(letter)
    assert pool.num_cached("a") == 1


def test_one_hit_does_not_protect() -> None:
    pool = Pool(4)
    for _ in range(2):
        pool.visit("a")
    for letter in "stuvwxyz":
        pool.visit(letter)
    assert pool.num_cached("a") == 0


def test_looking_without_taking_is_no_hit() -> None:
    pool = Pool(4)
    pool.visit("a")
    for _ in range(9):
        assert pool.num_cached("a") == 1
    for letter in "stuvwxyz":
        pool.visit(letter)
    assert pool.num_cached("a") == 0


def test_protected_blocks_beyond_their_share_go_back_to_probation() -> None:
    pool = Pool(4, protected_share=0.5)
    for letter in "abc":
        for _ in range(3):
            pool.visit(letter)
    for letter in "vwxyz":
        pool.visit(letter)
    assert [pool.num_cached(letter) for letter in "abc"] == [0, 1, 1]


def test_protected_blocks_are_evicted_when_probation_is_empty() -> None:
    pool = Pool(2, protected_share=1.0)
    for _ in range(3):
        pool.visit("ab")
    pool.allocator.allocate(2)
    assert pool.cache.num_cached == 0


def test_blocks_in_use_and_pinned_are_not_evictable() -> None:
    pool = Pool(3)
    used = pool.compute("a")
    pinned = pool.visit("b")
    pool.visit("c")
    pool.allocator.pin(pinned)
    assert pool.allocator.num_available == 1
    pool.allocator.allocate(1)
    with pytest.raises(OutOfBlocksError):
        pool.allocator.allocate(1)
    assert [pool.num_cached(letter) for letter in "abc"] == [1, 1, 0]
    pool.allocator.release(used)
    pool.allocator.unpin(pinned)
    assert pool.allocator.num_available == 2
    pool.allocator.check_integrity()


def test_pinning_makes_no_reference_and_sharing_keeps_the_pin() -> None:
    pool = Pool(3)
    blocks = pool.visit("a")
    pool.allocator.pin(blocks)
    assert pool.compute("a") == blocks
    pool.allocator.unpin(blocks)
    assert pool.allocator.num_available == 2
    pool.allocator.release(blocks)
    assert pool.allocator.num_available == 3
    pool.allocator.check_integrity()


def test_evictable_block_named_twice_in_one_call_is_counted_once() -> None:
    pool = Pool(3)
    blocks = pool.visit("a")
    pool.allocator.share(blocks * 2)
    assert pool.allocator.num_available == 2
    pool.allocator.release(blocks * 2)
    pool.allocator.pin(blocks * 2)
    pool.allocator.unpin(blocks * 2)
    assert pool.allocator.num_available == 3
    pool.allocator.check_integrity()


def copy_of_a_with_child_in_use(pool: Pool) -> tuple[list[int], list[int]]:
    """Cache "a" as evictable and "ab" as in use by a sequence with its own copy of "a"."""
    root = pool.root()
    cached, own = pool.allocator.allocate(1), pool.allocator.allocate(2)
    pool.insert("a", cached, root)
    pool.insert("ab", own, root)
    pool.allocator.release(cached)
    return cached, own


def test_evictable_parent_of_a_block_in_use_can_be_reclaimed() -> None:
    pool = Pool(3)
    cached, own = copy_of_a_with_child_in_use(pool)
    assert pool.allocator.num_available == 1
    assert pool.allocator.allocate(1) == cached
    assert pool.cache.num_cached == 0  # the child left the cache before its parent
    assert pool.allocator.num_references(own[1]) == 1
    pool.allocator.check_integrity()
    pool.allocator.release(own + cached)
    assert pool.allocator.num_free == 3


def test_leaves_are_evicted_before_a_parent_of_a_block_in_use() -> None:
    pool = Pool(4)
    copy_of_a_with_child_in_use(pool)
    pool.visit("x")
    pool.allocator.allocate(1)
    assert (pool.num_cached("ab"), pool.num_cached("x")) == (2, 0)


def test_nothing_is_cached_below_a_place_that_was_evicted() -> None:
    pool = Pool(4)
    root = pool.root()
    cached, own = pool.allocator.allocate(1), pool.allocator.allocate(1)
    pool.insert("a", cached, root)
    chain = pool.insert("a", own, root)
    pool.allocator.release(cached)
    pool.allocator.allocate(3)
    chain = pool.insert("b", own, chain)
    pool.insert("c", own, chain)
    assert pool.cache.num_cached == 0
    assert not pool.allocator.is_cached(own[0])


def test_flush_frees_what_nobody_uses_and_leaves_the_rest_to_its_users() -> None:
    pool = Pool(6)
    used, pinned = pool.compute("ab"), pool.visit("p")
    pool.allocator.pin(pinned)
    pool.visit("xy")
    pool.cache.flush()
    pool.allocator.check_integrity()
    assert pool.cache.num_cached == 0
    assert pool.allocator.num_free == 3
    pool.allocator.release(used)
    pool.allocator.unpin(pinned)
    assert pool.allocator.num_free == 6
    pool.allocator.check_integrity()


def test_what_was_computed_before_a_flush_is_not_cached_after_it() -> None:
    pool = Pool(6)
    root = pool.root()
    blocks = pool.allocator.allocate(3)
    chain = pool.insert("a", blocks[:1], root)
    pool.cache.flush()
    chain = pool.insert("b", blocks[1:2], chain)
    pool.insert("c", blocks[2:], chain)
    pool.insert("a", blocks[:1], root)
    assert pool.cache.num_cached == 0
    pool.insert("a", blocks[:1], pool.root())
    assert pool.cache.num_cached == 1


def test_integrity_check_finds_a_cached_block_that_was_written() -> None:
    pool = Pool(4)
    memory = [b"%d" % block for block in range(4)]
    blocks = pool.visit("ab")
    pool.cache.check_integrity(memory.__getitem__)
    pool.cache.check_integrity(memory.__getitem__)
    memory[blocks[1]] = b"!"
    with pytest.raises(IntegrityError, match=f"block {blocks[1]} was written while cached"):
        pool.cache.check_integrity(memory.__getitem__)


def test_evicted_block_may_be_written_and_cached_again() -> None:
    pool = Pool(1)
    memory = [b"a"]
    pool.visit("a")
    pool.cache.check_integrity(memory.__getitem__)
    memory[0] = b"b"
    pool.visit("b")
    pool.cache.check_integrity(memory.__getitem__)


def test_integrity_check_finds_a_parent_that_is_gone() -> None:
    pool = Pool(4)
    blocks = pool.visit("ab")
    parent = pool.cache._by_id.pop(blocks[0])
    del pool.cache._by_key[parent.key]
    with pytest.raises(IntegrityError, match=f"block {blocks[1]} hangs on a parent"):
        pool.cache.check_integrity()


def test_evicting_many_blocks_costs_the_same_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    num_turns = 0
    original = PrefixCache._next_leaf

    def counting(cache: PrefixCache) -> object:
        nonlocal num_turns
        before = len(cache._parents)
        leaf = original(cache)
        num_turns += 1 + len(cache._parents) - before
        return leaf

    monkeypatch.setattr(PrefixCache, "_next_leaf", counting)
    pool = Pool(1000)
    blocks = pool.compute("".join(map(chr, range(1000, 2000))))
    for block in blocks:  # the worst order: every parent's turn is before its child's
        pool.allocator.release([block])
    for _ in range(1000):
        pool.allocator.allocate(1)
    assert num_turns <= 2 * 1000


def test_pool_has_one_cache() -> None:
    pool = Pool(4)
    with pytest.raises(ValueError, match="already"):
        PrefixCache(pool.allocator, BLOCK_TOKENS, bytes(32))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_impossible_protected_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=str(share)):
        Pool(4, share)


def test_what_hangs_on_forgotten_blocks_is_found_no_more_and_can_be_cached_again() -> None:
    pool = Pool(12)
    failed = pool.compute("abc")
    sharing = pool.compute("abd")  # runs on, from blocks that may be damaged
    chain = pool.cache.match(context("abc"), "", 12).chain
    pool.allocator.release(failed)
    pool.cache.forget(chain)
    assert [pool.num_cached(text) for text in ("abc", "abd")] == [0, 0]
    pool.allocator.check_integrity()
    pool.allocator.release(failed)
    again = pool.compute("abd")
    assert pool.num_cached("abd") == 3
    assert not set(again) & set(sharing)
    for blocks in (sharing, again):
        pool.allocator.release(blocks)
    pool.allocator.check_integrity()
    pool.allocator.allocate(12)
    assert pool.cache.num_cached == 0


def test_forgetting_costs_the_same_however_much_hangs_on_the_blocks() -> None:
    counts = []
    for num_others in (2, 50):
        pool = Pool(200)
        for number in range(num_others):
            pool.visit("a" + chr(ord("A") + number))
        chain = pool.cache.match(context("a"), "", BLOCK_TOKENS).chain
        counts.append(num_opcodes(lambda: pool.cache.forget(chain)))  # noqa: B023 - called at once
        pool.allocator.check_integrity()
    assert counts[0] == counts[1]
