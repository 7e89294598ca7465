"""Tiles of decode attention whose shares are cut in a given way, whatever the rows' lengths."""

from paceline.kernels.decode_tiles import DecodeTiles

NEVER, ALWAYS = -(10**6), 10**6


def even_tiles(block_m: int, block_n: int, num_shares: int) -> DecodeTiles:
    """Shares over the borders of rows."""
    return DecodeTiles(block_m, block_n, num_shares, start_tiles=NEVER)


def aligned_tiles(block_m: int, block_n: int, num_shares: int) -> DecodeTiles:
    """Shares of one row each, by the kernel that expects any."""
    return DecodeTiles(block_m, block_n, num_shares, start_tiles=ALWAYS)


def one_row_tiles(block_m: int, block_n: int, num_shares: int) -> DecodeTiles:
    """Shares of one row each, by the kernel that expects no others."""
    return DecodeTiles(block_m, block_n, num_shares, one_row=True)
