"""Find blocks that already hold the KV of a context's beginning.

Cached blocks form a tree: a block's children hold what followed its tokens. A full, final block is
inserted by the sequence that computed it, under the sequence's place in the tree; `match` walks
down from the tenant's root. Names are keyed, chained hashes (`paceline.block_keys`); token ids are
compared on every hit, so that even two contexts with equal names never share KV.

The order of eviction is segmented LRU, leaves first:

    probation   blocks matched fewer than two times; evicted first, the least recently used first
    protected   blocks matched twice or more. Bounded: beyond its share the least recently used goes
                back to probation, as its most recently used, with one hit
    parents     blocks whose turn came while they had cached children; set aside until the last
                child has gone, then first in their segment, because their turn was before others'

Blocks in use are in none of them. Only when nothing else is left is a parent evicted whose
children are all in use; those leave the cache before it and stay with their users. Each of these
moves is O(1), and a block is set aside at most once for each time it was used or got a child.

KV that may be damaged is forgotten block by block. What was computed from it may be most of the
cache, so it stays, as orphans that no context leads to: a child is found only behind its own
parent. Orphans leave by eviction, or when the same content is cached again.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from paceline.block_keys import TOKEN_ID_BYTES, BlockKeys, token_bytes
from paceline.engine.block_allocator import BlockAllocator
from paceline.errors import IntegrityError
from paceline.request import TokenIds

Checksum = Callable[[int], bytes]
"""Block id → digest of its bytes in the pool."""

NUM_HITS_PROTECTED = 2


class CachedBlock:
    """A block that the cache knows. Owned and changed by the cache."""

    __slots__ = (
        "block_id",
        "checksum",
        "children",
        "is_cached",
        "key",
        "num_hits",
        "parent",
        "parent_key",
        "queue",
        "tokens",
    )

    def __init__(
        self,
        key: bytes,
        parent_key: bytes,
        parent: "CachedBlock | None",
        tokens: bytes,
        block_id: int,
    ) -> None:
        self.key = key
        self.parent_key = parent_key
        self.parent = parent
        """None: its parent is the root of a tenant."""
        self.tokens = tokens
        self.block_id = block_id
        self.num_hits = 0
        self.is_cached = True
        """False for ever once it has left the cache."""
        self.children: set[CachedBlock] | None = None
        """None: there was none yet. A set for each block would double the cost of an insert."""
        self.queue: OrderedDict[CachedBlock, None] | None = None
        """Where it waits for eviction; None while it is in use."""
        self.checksum: bytes | None = None
        """Set by `check_integrity`."""

    @property
    def is_orphan(self) -> bool:
        """Whether its parent has left the cache before it, so that no context leads here."""
        return self.parent is not None and not self.parent.is_cached


Queue = OrderedDict[CachedBlock, None]


class ChainPosition(NamedTuple):
    """A place in the tree: after some blocks of a context. Opaque to callers, and never changes."""

    key: bytes
    block: CachedBlock | None
    """The last block before this place; None: the place is a root."""
    flush_count: int | None
    """Flushes that came before it. None: nothing can be cached below this place."""


class PrefixMatch(NamedTuple):
    """The cached beginning of a context."""

    block_ids: list[int]
    """One reference each now belongs to the caller, who releases them."""
    chain: ChainPosition
    """The place after these blocks."""


class PrefixCache:
    """The cached blocks of one pool. Used by the engine thread alone."""

    def __init__(
        self,
        allocator: BlockAllocator,
        block_tokens: int,
        root_key: bytes,
        *,
        protected_share: float = 0.8,
    ) -> None:
        """Become the eviction policy of `allocator`.

        protected_share: the share of the pool that evictable protected blocks may take, 0 to 1. The
        rest stays for newcomers, so that old favourites cannot keep every new prefix out.
        """
        if not 0 <= protected_share <= 1:
            raise ValueError(f"protected_share is {protected_share}; it must be from 0 to 1")
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}; it must be at least 1")
        self._allocator = allocator
        self._block_tokens = block_tokens
        self._keys = BlockKeys(root_key)
        self._by_key: dict[bytes, CachedBlock] = {}
        self._by_id: dict[int, CachedBlock] = {}
        self._probation: Queue = OrderedDict()
        self._protected: Queue = OrderedDict()
        self._parents: Queue = OrderedDict()
        self._max_protected = int(protected_share * allocator.num_blocks)
        self._flush_count = 0
        self.num_evictions = 0
        """Blocks that left the cache to make room, since the start."""
        allocator.set_policy(self)

    @property
    def num_cached(self) -> int:
        """Blocks in the cache, in use or not."""
        return len(self._by_key)

    def match(self, tokens: TokenIds, tenant: str, limit: int | None = None) -> PrefixMatch:
        """Take a reference to each cached block of the beginning of `tokens`.

        limit: match at most this many tokens. The default leaves at least the last token to be
        computed, because its logits are needed; a worker that only reads KV may pass len(tokens).
        """
        blocks, chain = self._walk(tokens, tenant, limit)
        for block in blocks:
            block.num_hits += 1
        block_ids = [block.block_id for block in blocks]
        self._allocator.share(block_ids)
        return PrefixMatch(block_ids, chain)

    def num_matching_blocks(self, tokens: TokenIds, tenant: str, limit: int | None = None) -> int:
        """Say how many blocks `match` would find; takes nothing and counts as no use."""
        return len(self._walk(tokens, tenant, limit)[0])

    def insert(
        self, chain: ChainPosition, tokens_of_block: TokenIds, block_id: int
    ) -> ChainPosition:
        """Register a full block whose KV is final, and return the place after it.

        The caller holds a reference and never writes the block again. If the same content is cached
        already, in an older block, that one stays and the caller keeps its own block uncached.
        Nothing is cached below a place that has left the cache, by eviction or flush.
        """
        if len(tokens_of_block) != self._block_tokens:
            raise ValueError(
                f"a block of {self._block_tokens} tokens cannot be cached with "
                f"{len(tokens_of_block)} tokens: only full blocks are"
            )
        parent = chain.block
        if chain.flush_count != self._flush_count or (parent and not parent.is_cached):
            return chain._replace(flush_count=None)
        tokens = token_bytes(tokens_of_block)
        key = self._keys.next_key(chain.key, tokens)
        block = self._by_key.get(key)
        if block is not None and block.is_orphan:
            self._forget(block)
            block = None
        if block is None:
            self._allocator.set_cached(block_id)
            block = CachedBlock(key, chain.key, parent, tokens, block_id)
            self._by_key[key] = block
            self._by_id[block_id] = block
            if parent is not None:
                if parent.children is None:
                    parent.children = {block}
                else:
                    parent.children.add(block)
        elif block.tokens != tokens or block.parent_key != chain.key or block.parent is not parent:
            return chain._replace(flush_count=None)  # another context has the same name
        return ChainPosition(key, block, self._flush_count)

    def flush(self) -> None:
        """Forget everything, because the weights changed.

        Blocks in use stay with their users; what those compute from now on below places that they
        got before the flush is not cached.
        """
        self._flush_count += 1
        block_ids = list(self._by_id)
        for block in self._by_key.values():
            block.is_cached = False
            block.parent = None
            block.queue = None
            block.children = None
        for index in (self._by_key, self._by_id, self._probation, self._protected, self._parents):
            index.clear()
        self._allocator.uncache(block_ids)

    # Called by the allocator: see EvictionPolicy.

    def on_evictable(self, block_ids: Sequence[int]) -> None:
        """Take cached blocks that nobody uses any more, in the order of their sequence."""
        by_id = self._by_id
        for block_id in reversed(block_ids):  # the end of a context is older than its beginning
            block = by_id[block_id]
            queue = self._segment(block)
            queue[block] = None
            block.queue = queue
        self._bound_protected()

    def on_used(self, block_ids: Sequence[int]) -> None:
        """Give up evictable blocks because somebody uses them again; they stay cached."""
        for block_id in block_ids:
            block = self._by_id[block_id]
            queue = block.queue
            if queue is None:
                raise IntegrityError(f"block {block_id} is used, but it was not evictable")
            del queue[block]
            block.queue = None

    def evict(self, count: int) -> None:
        """Forget at least `count` evictable blocks, leaves first."""
        num_wanted = self._allocator.num_free + count
        while self._allocator.num_free < num_wanted:
            leaf = self._next_leaf()
            if leaf is not None:
                self._forget(leaf)
            else:
                # Every evictable block has cached children, and below each of them is one in use.
                self._forget_subtree(next(iter(self._parents)))

    def forget(self, chain: ChainPosition) -> None:
        """Take all blocks before a place out of the cache; what hangs on them is found no more.

        For KV from which no token could be chosen: any of it may be damaged. Sequences that use
        the blocks keep them. O(blocks before the place): what hangs on them, perhaps most of the
        cache, is left to eviction.
        """
        block = chain.block
        while block is not None and block.is_cached:
            parent = block.parent
            self._forget(block)
            block = parent

    def check_integrity(self, checksum: Checksum | None = None) -> None:
        """Raise IntegrityError unless tree, queues and allocator agree. O(num_cached).

        checksum: also compare each cached block's bytes with those at the first check that saw it.
        """
        for key, block in self._by_key.items():
            self._check_block(key, block)
            if checksum is not None:
                self._check_content(block, checksum(block.block_id))
        num_queued = len(self._probation) + len(self._protected) + len(self._parents)
        num_evictable = self._allocator.num_available - self._allocator.num_free
        if num_queued != num_evictable or len(self._by_id) != len(self._by_key):
            raise IntegrityError(
                f"{num_queued} blocks wait for eviction and {num_evictable} are evictable; "
                f"{len(self._by_id)} ids and {len(self._by_key)} keys are cached"
            )
        if len(self._protected) > self._max_protected:
            raise IntegrityError(
                f"{len(self._protected)} protected blocks exceed their share of "
                f"{self._max_protected}"
            )

    def _walk(
        self, tokens: TokenIds, tenant: str, limit: int | None
    ) -> tuple[list[CachedBlock], ChainPosition]:
        if limit is None:
            limit = max(len(tokens) - 1, 0)
        elif not 0 <= limit <= len(tokens):
            raise ValueError(
                f"limit is {limit}; it must be from 0 to {len(tokens)}, the tokens given"
            )
        data = token_bytes(tokens[: limit - limit % self._block_tokens])
        block_bytes = self._block_tokens * TOKEN_ID_BYTES
        key = self._keys.tenant_key(tenant)
        blocks: list[CachedBlock] = []
        parent: CachedBlock | None = None
        for start in range(0, len(data), block_bytes):
            block_data = data[start : start + block_bytes]
            next_key = self._keys.next_key(key, block_data)
            block = self._by_key.get(next_key)
            # The parent's own tokens were compared one round earlier, so all tokens before are
            # the same. An orphan has the right key, another parent, and KV that may be damaged.
            if block is None or block.tokens != block_data or block.parent is not parent:
                break
            if block.parent_key != key:
                break
            blocks.append(block)
            key, parent = next_key, block
        return blocks, ChainPosition(key, blocks[-1] if blocks else None, self._flush_count)

    def _segment(self, block: CachedBlock) -> Queue:
        return self._protected if block.num_hits >= NUM_HITS_PROTECTED else self._probation

    def _next_leaf(self) -> CachedBlock | None:
        """Find the evictable block whose turn it is, setting aside parents on the way."""
        for queue in (self._probation, self._protected):
            while queue:
                block = next(iter(queue))
                if not block.children:
                    return block
                del queue[block]
                self._parents[block] = None
                block.queue = self._parents
        return None

    def _forget_subtree(self, top: CachedBlock) -> None:
        """Take a block and all below it out of the cache, the deepest first."""
        order = [top]
        for block in order:  # grows while it is walked
            order.extend(block.children or ())
        for block in reversed(order):
            self._forget(block)

    def _forget(self, block: CachedBlock) -> None:
        """Take a block out of the cache; it becomes free unless it is in use.

        Its children become orphans: they stay until they are evicted or replaced.
        """
        del self._by_key[block.key]
        del self._by_id[block.block_id]
        block.is_cached = False
        if block.queue is not None:
            del block.queue[block]
            block.queue = None
            self.num_evictions += 1
        parent, block.parent = block.parent, None
        if parent is not None and parent.children is not None:
            parent.children.remove(block)
            if not parent.children and parent.queue is self._parents:
                del self._parents[parent]
                queue = self._segment(parent)
                queue[parent] = None
                queue.move_to_end(parent, last=False)
                parent.queue = queue
                self._bound_protected()
        self._allocator.uncache((block.block_id,))

    def _bound_protected(self) -> None:
        while len(self._protected) > self._max_protected:
            block, _ = self._protected.popitem(last=False)
            block.num_hits = NUM_HITS_PROTECTED - 1
            self._probation[block] = None
            block.queue = self._probation

    def _check_block(self, key: bytes, block: CachedBlock) -> None:
        allocator, block_id = self._allocator, block.block_id
        used = bool(allocator.num_references(block_id) or allocator.num_pins(block_id))
        queued = block.queue is not None and block in block.queue
        parent = block.parent
        problems = {
            "is not marked in the allocator": not allocator.is_cached(block_id),
            "is not found under its key and id": block.key != key
            or self._by_id.get(block_id) is not block
            or not block.is_cached,
            f"is used ({used}) and waits for eviction ({queued})": used == queued,
            "hangs on a parent that does not know it": parent is not None
            and block not in (parent.children or ()),
            "hangs on a parent that another block has replaced": parent is not None
            and parent.is_cached
            and self._by_key.get(parent.key) is not parent,
            "has a child that is not cached": any(
                self._by_key.get(child.key) is not child for child in block.children or ()
            ),
        }
        for problem, found in problems.items():
            if found:
                raise IntegrityError(f"cached block {block_id} {problem}")

    def _check_content(self, block: CachedBlock, checksum: bytes) -> None:
        if block.checksum is None:
            block.checksum = checksum
        elif block.checksum != checksum:
            raise IntegrityError(
                f"block {block.block_id} was written while cached: its checksum was "
                f"{block.checksum.hex()} and is {checksum.hex()}"
            )
