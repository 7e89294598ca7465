"""What the two ends of a `torch_distributed` pair say to each other over the KV session.

    reader → owner   Ask     send me these blocks, number `seq`
                     Drop    I have given up everything up to number `seq`
    owner → reader   Go      number `seq` follows on the communicator of `generation`
                     No      number `seq` does not come, or does not come whole
    both ways        Put     a key of the rendezvous of `generation`

Integers are little-endian; the first byte says which message it is.
"""

import struct
from dataclasses import dataclass

from paceline.errors import TransportError

_ASK = struct.Struct("<BQQQ?")
_NUMBERED = struct.Struct("<BQ")
_GO = struct.Struct("<BQI")
_PUT = struct.Struct("<BIH")


@dataclass(frozen=True, slots=True)
class Ask:
    seq: int
    lease_id: int
    num_bytes: int
    is_probe: bool
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    seq: int


@dataclass(frozen=True, slots=True)
class Go:
    seq: int
    generation: int


@dataclass(frozen=True, slots=True)
class No:
    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Put:
    generation: int
    key: str
    value: bytes


PairMessage = Ask | Drop | Go | No | Put


def encode(message: PairMessage) -> bytes:
    match message:
        case Ask(seq, lease_id, num_bytes, is_probe, sources):
            head = _ASK.pack(1, seq, lease_id, num_bytes, is_probe)
            return head + struct.pack(f"<{len(sources)}I", *sources)
        case Drop(seq):
            return _NUMBERED.pack(2, seq)
        case Go(seq, generation):
            return _GO.pack(3, seq, generation)
        case No(seq, reason):
            return _NUMBERED.pack(4, seq) + reason.encode()
        case Put(generation, key, value):
            name = key.encode()
            return _PUT.pack(5, generation, len(name)) + name + value


def decode(payload: bytes) -> PairMessage:
    """Raise TransportError when the payload is none of the messages."""
    try:
        match payload[0]:
            case 1:
                _, seq, lease_id, num_bytes, is_probe = _ASK.unpack_from(payload)
                count, rest = divmod(len(payload) - _ASK.size, 4)
                if not rest:
                    sources = struct.unpack_from(f"<{count}I", payload, _ASK.size)
                    return Ask(seq, lease_id, num_bytes, is_probe, sources)
            case 2:
                return Drop(_NUMBERED.unpack(payload)[1])
            case 3:
                return Go(*_GO.unpack(payload)[1:])
            case 4:
                seq = _NUMBERED.unpack_from(payload)[1]
                return No(seq, payload[_NUMBERED.size :].decode())
            case 5:
                _, generation, length = _PUT.unpack_from(payload)
                end = _PUT.size + length
                return Put(generation, payload[_PUT.size : end].decode(), payload[end:])
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise TransportError(f"a torch_distributed message is damaged: {error}") from error
    raise TransportError(
        f"a torch_distributed message of {len(payload)} bytes starts with {payload[:1]!r}, which "
        "this version of paceline does not know"
    )
