"""Frames of HTTP/2 for clients that break its customs, which no gRPC library lets one do."""

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0x0, 0x1, 0x3, 0x4
_END_STREAM, _END_HEADERS = 0x1, 0x4
_CANCEL = 8
_INITIAL_WINDOW_SIZE = 4


def opening(window_bytes: int = 65_535) -> bytes:
    """Begin a connection; `window_bytes` may be sent to each of its streams unasked."""
    settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window_bytes)
    return PREFACE + _frame(_SETTINGS, 0, 0, settings)


def call(stream_id: int, path: str, message: bytes) -> bytes:
    """Call a method with one message; stream ids are odd and grow."""
    headers = b"".join(
        _literal(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    body = struct.pack(">BI", 0, len(message)) + message
    return _frame(_HEADERS, _END_HEADERS, stream_id, headers) + _frame(
        _DATA, _END_STREAM, stream_id, body
    )


def reset(stream_id: int) -> bytes:
    """Give a call up."""
    return _frame(_RST_STREAM, 0, stream_id, struct.pack(">I", _CANCEL))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return (
        struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload
    )


def _literal(name: str, value: str) -> bytes:
    """Write a header without the compression's table; both texts are shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
