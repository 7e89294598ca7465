"""Run the parts of a warp-specialised Gluon kernel as threads, on arrays in place of its tensors.

Shows what a kernel computes, whether its parts wait for each other for ever, and whether each waits
for what it uses: a buffer is spoilt as soon as a copy to it begins, copies arrive late and in any
order, and what a product reads must not change until the product is waited for. Stores to shared
memory must be fenced before a product or a copy comes to it. Parts pause at random. Not shown: what
a compiler or the hardware gets wrong, nor whether the warps of one part wait for each other.
"""

import ctypes
import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch

DEADLINE_S = 20.0


class Int(int):
    """A scalar."""

    def to(self, _dtype: object) -> "Int":
        return self


class Pointer:
    """Elements of a tensor's storage, from the tensor's first on."""

    def __init__(self, tensor: torch.Tensor, places: Any = 0) -> None:
        self.tensor = tensor
        self.places = places
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, places: Any) -> "Pointer":
        return Pointer(self.tensor, self.places + places)

    def flat(self) -> torch.Tensor:
        num_elements = self.tensor.untyped_storage().nbytes() // self.tensor.itemsize
        start = self.tensor.storage_offset()
        return self.tensor.as_strided((num_elements - start,), (1,))


class Descriptor:
    """Rows of a pool that are copied in pieces: of what lies at the address, as on a GPU."""

    def __init__(self, descriptor: Any) -> None:
        base = descriptor.base
        (num_rows, row_size), (stride, _) = descriptor.shape, descriptor.strides
        num_elements = (num_rows - 1) * stride + row_size
        memory = (ctypes.c_byte * (num_elements * base.dtype.itemsize)).from_address(
            base.data_ptr()
        )
        elements = torch.frombuffer(memory, dtype=base.dtype)
        self.rows = elements.as_strided(descriptor.shape, descriptor.strides)
        self.block_shape = descriptor.block_shape


class Barrier:
    """Phases that end once `count` arrived and the expected bytes came."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrived = self.num_bytes = self.phase = 0

    def change(self, arrived: int, num_bytes: int) -> None:
        with self.changed:
            self.arrived += arrived
            self.num_bytes += num_bytes
            assert self.arrived <= self.count, "more arrived than a phase has room for"
            if self.arrived == self.count and self.num_bytes == 0:
                self.arrived = 0
                self.phase += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            ended = self.changed.wait_for(lambda: self.phase % 2 != parity, DEADLINE_S)
        if not ended:
            raise TimeoutError(f"phase {self.phase} of {self.arrived} of {self.count} never ended")


class Stores:
    """Where each part has stored to and not fenced: products and copies come by another way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[int, list[range]] = {}

    def add(self, data: torch.Tensor) -> None:
        with self._lock:
            self._places.setdefault(threading.get_ident(), []).append(bytes_of(data))

    def fence(self) -> None:
        with self._lock:
            self._places.pop(threading.get_ident(), None)

    def check(self, data: torch.Tensor, *, of_all: bool) -> None:
        """Raise where a store of this part, or of any, is not fenced."""
        read = bytes_of(data)
        with self._lock:
            for part, places in self._places.items():
                for place in places if of_all or part == threading.get_ident() else []:
                    apart = place.stop <= read.start or read.stop <= place.start
                    assert apart, "a store was not fenced"


def bytes_of(data: torch.Tensor) -> range:
    return range(data.data_ptr(), data.data_ptr() + data.numel() * data.itemsize)


class Buffer:
    """Shared memory."""

    def __init__(self, data: torch.Tensor, stores: Stores) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape
        self.stores = stores

    def index(self, number: int) -> "Buffer":
        return Buffer(self.data[number], self.stores)

    def slice(self, start: int, length: int) -> "Buffer":
        return Buffer(self.data[start : start + length], self.stores)

    def permute(self, order: tuple[int, ...]) -> "Buffer":
        return Buffer(self.data.permute(order), self.stores)

    def load(self, _layout: object) -> torch.Tensor:
        return self.data.clone()

    def store(self, values: torch.Tensor) -> None:
        self.data.copy_(values)
        self.stores.add(self.data)


class Barriers:
    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, number: int) -> Barrier:
        return self.barriers[number]


def scalar_or(operation: Callable[..., Any], scalars: Callable[..., int]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        if any(isinstance(value, torch.Tensor) for value in values):
            return operation(*(torch.as_tensor(value) for value in values))
        return Int(scalars(*values))

    return apply


def load(pointer: Pointer, mask: Any = True, other: int = 0) -> Any:
    if isinstance(pointer.places, torch.Tensor):
        return pointer.flat()[pointer.places]
    return Int(pointer.flat()[pointer.places]) if mask else Int(other)


def store(pointer: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
    mask = mask.expand_as(values)
    pointer.flat()[pointer.places[mask]] = values[mask]


class CopyEngine:
    """Copies that were begun arrive in any order."""

    def __init__(self, pauses: random.Random) -> None:
        self._pauses = pauses
        self._begun: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def copy(self, pool: Descriptor, place: list[int], barrier: Barrier, target: Buffer) -> None:
        row, column = place
        assert column == 0
        arriving = torch.zeros_like(target.data)
        for number in range(pool.block_shape[0]):
            if 0 <= row + number < len(pool.rows):
                arriving[number] = pool.rows[row + number]
        target.stores.check(target.data, of_all=True)
        target.data.fill_(torch.nan)

        def arrive() -> None:
            target.data.copy_(arriving)
            barrier.change(0, -arriving.numel() * arriving.itemsize)

        with self._changed:
            self._begun.append(arrive)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._begun or not self._open)
                if not self._begun:
                    return
                arrive = self._begun.pop(self._pauses.randrange(len(self._begun)))
            pause(self._pauses)
            arrive()


def pause(pauses: random.Random) -> None:
    if pauses.random() < 0.2:
        time.sleep(pauses.random() * 2e-4)


class Product:
    """A product that runs until it is waited for."""

    def __init__(self, a: Any, b: Buffer, sums: Any, use_acc: bool = True, **_: object) -> None:
        for x in (a, b):
            if isinstance(x, Buffer):
                x.stores.check(x.data, of_all=False)
        self._operands = [x.data for x in (a, b) if isinstance(x, Buffer)]
        self._begun_with = [x.clone() for x in self._operands]
        a = a.data if isinstance(a, Buffer) else a
        self._result = a.float() @ b.data.float() + (sums if use_acc else 0)

    def wait(self) -> torch.Tensor:
        for old, new in zip(self._begun_with, self._operands, strict=True):
            same = torch.equal(old.view(torch.int16), new.contiguous().view(torch.int16))
            assert same, "what a product reads changed while it ran"
        return self._result


class StandIn:
    """The names that a kernel's module takes from Gluon."""

    def __init__(self, module: types.ModuleType, num_programs: int, seed: int = 0) -> None:
        """module: its functions that are decorated are run in it as they are written.

        seed: of the pauses.
        """
        self._program = 0
        self._num_programs = num_programs
        self._pauses = random.Random(seed)
        self._stores = Stores()
        self.names: dict[str, Any] = dict(vars(module))
        for name, value in vars(module).items():
            if hasattr(value, "fn"):
                code = value.fn.__code__
                self.names[name] = types.FunctionType(code, self.names, name)
        self.names |= {
            "gl": self._language(),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: setattr(barrier, "count", count),
                wait=self._wait,
                expect=lambda barrier, num_bytes: barrier.change(1, num_bytes),
                arrive=lambda barrier: barrier.change(1, 0),
            ),
            "fence_async_shared": self._stores.fence,
            "warpgroup_mma": Product,
            "warpgroup_mma_wait": self._wait_for_products,
        }

    def run(self, kernel: str, *arguments: Any, **sizes: Any) -> None:
        """Run all programs of a kernel, one after another."""
        for program in range(self._num_programs):
            self._program = program
            engine = CopyEngine(self._pauses)
            self.names["_copy"] = engine.copy
            with engine:
                self.names[kernel](*arguments, **sizes)

    def _wait(self, barrier: Barrier, parity: int) -> None:
        pause(self._pauses)
        barrier.wait(parity)
        pause(self._pauses)

    def _wait_for_products(self, _num_running: int, deps: list[Any]) -> Any:
        pause(self._pauses)
        done = [x.wait() if isinstance(x, Product) else x for x in deps]
        return done[0] if len(done) == 1 else tuple(done)

    def _allocate(self, dtype: Any, shape: list[int], _layout: object) -> Any:
        if dtype is torch.int64:
            return Barriers(shape[0])
        return Buffer(torch.full(shape, torch.nan, dtype=dtype), self._stores)

    def _language(self) -> Any:
        def ignored(*_: object) -> None:
            return None

        return types.SimpleNamespace(
            constexpr=None,
            int64=torch.int64,
            float32=torch.float32,
            program_id=lambda _: self._program,
            num_programs=lambda _: self._num_programs,
            static_range=range,
            load=load,
            store=store,
            where=scalar_or(torch.where, lambda test, a, b: a if test else b),
            maximum=scalar_or(torch.maximum, max),
            minimum=scalar_or(torch.minimum, min),
            cdiv=lambda a, b: -(-a // b),
            arange=lambda start, stop, _: torch.arange(start, stop),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
            zeros_like=torch.zeros_like,
            exp2=torch.exp2,
            max=torch.amax,
            sum=torch.sum,
            convert_layout=lambda values, _: values,
            allocate_shared_memory=self._allocate,
            warp_specialize=specialize,
            BlockedLayout=ignored,
            DotOperandLayout=ignored,
            NVMMADistributedLayout=ignored,
            NVMMASharedLayout=ignored,
            SliceLayout=ignored,
        )


def specialize(
    parts: list[tuple[Any, tuple[Any, ...]]], _warps: object, _registers: object
) -> None:
    faults: list[BaseException] = []

    def run(part: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            part(*arguments)
        except BaseException as fault:
            faults.append(fault)

    threads = [
        threading.Thread(target=run, args=part, name=f"part {number}")
        for number, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
