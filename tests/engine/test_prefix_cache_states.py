"""Nothing that was computed from damaged KV is ever found, whatever happens in what order."""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import ChainPosition, PrefixCache
from paceline.request import TokenIds

SIZE = 2
NUM_BLOCKS = 12
# Few texts that begin alike, of up to four blocks.
TEXTS = [np.array(text, dtype=np.int32) for text in itertools.product((1, 2), repeat=4)]


@dataclass(eq=False)
class Running:
    """A sequence with its blocks, those before `num_inserted` in the cache."""

    tokens: TokenIds
    blocks: list[int]
    chain: ChainPosition
    num_inserted: int


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.cache = PrefixCache(self.allocator, SIZE, bytes(32))
        self.running: list[Running] = []
        self.computed_from: dict[int, set[int]] = {}
        """Computations that a block's content rests on, its own included."""
        self.damaged: set[int] = set()
        self.num_computations = 0

    def is_damaged(self, block_id: int) -> bool:
        return not self.damaged.isdisjoint(self.computed_from[block_id])

    @rule(text=st.sampled_from(TEXTS), num_blocks=st.integers(1, 4))
    def start(self, text: TokenIds, num_blocks: int) -> None:
        tokens = np.repeat(text, SIZE)[: num_blocks * SIZE]
        match = self.cache.match(tokens, "", limit=len(tokens))
        assert not any(map(self.is_damaged, match.block_ids)), "damaged KV was found"
        num_new = num_blocks - len(match.block_ids)
        if num_new > self.allocator.num_available:
            self.allocator.release(match.block_ids)
            return
        blocks = match.block_ids + self.allocator.allocate(num_new)
        for number in range(len(match.block_ids), num_blocks):
            self.num_computations += 1
            before = self.computed_from[blocks[number - 1]] if number else set()
            self.computed_from[blocks[number]] = before | {self.num_computations}
        self.running.append(Running(tokens, blocks, match.chain, len(match.block_ids)))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 20), count=st.integers(1, 4))
    def insert(self, number: int, count: int) -> None:
        sequence = self.running[number % len(self.running)]
        for index in range(sequence.num_inserted, len(sequence.blocks))[:count]:
            tokens = sequence.tokens[index * SIZE : (index + 1) * SIZE]
            sequence.chain = self.cache.insert(sequence.chain, tokens, sequence.blocks[index])
            sequence.num_inserted += 1

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 20))
    def fail(self, number: int) -> None:
        """No token could be chosen: any block that the cache gave or got may be damaged."""
        sequence = self.running[number % len(self.running)]
        block = sequence.chain.block
        is_known = block is not None and block.is_cached
        while is_known and block is not None:
            self.damaged.add(max(self.computed_from[block.block_id]))
            block = block.parent
        self.cache.forget(sequence.chain)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 20))
    def end(self, number: int) -> None:
        sequence = self.running.pop(number % len(self.running))
        self.allocator.release(sequence.blocks)

    @invariant()
    def everything_adds_up(self) -> None:
        self.allocator.check_integrity()

    def teardown(self) -> None:
        for sequence in self.running:
            self.allocator.release(sequence.blocks)
        assert self.allocator.num_available == NUM_BLOCKS
        self.allocator.allocate(NUM_BLOCKS)  # evicts everything, orphans too
        assert self.cache.num_cached == 0


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
