"""Shadow memory: every load and store of Triton's interpreter is looked up before it happens.

All memory traffic of the interpreter passes four functions of its native module; `Shadow` stands in for that module.
A lane that breaks a rule is recorded and not performed (a load gives poison), so one run reports every fault it has.

Rules
  read-outside    a load from no cell of any tensor           write-outside  a store to no cell of any tensor
  read-forbidden  a load of a FORBIDDEN input cell            write-input    a store to a cell of an `in` argument
  uninitialised   a load of an output cell that this call has not written
  race            one program touches a cell that another program of the same launch changes, in no defined order.
                  Programs that store the very value a cell already holds do not race: every order gives the same bytes.
  grid            a launch that hardware refuses: an empty grid, or y or z over 65,535
"""

import os
import sys

import numpy as np

from . import arena as arena_module

WRITE, INIT = 1, 2
RULES = ("read-outside", "write-outside", "read-forbidden", "write-input", "uninitialised", "race", "grid")
MOST_FINDINGS = 32
_SLOT_BITS = np.uint64(arena_module.SLOT_BITS)
_NO_LANES = np.zeros(0, dtype=np.int64)
_SPARSE = 1 << 22
_MANY = 0xFFFFFFFF
_ATOMIC = 0xFFFFFFFE


class _Marks:
    """One number per granule of a block; large arrays are backed by untouched address space."""

    def __init__(self, count: int, dtype):
        self.mapped = None
        size = count * np.dtype(dtype).itemsize
        if size <= _SPARSE:
            self.array = np.zeros(count, dtype=dtype)
        else:
            size = -(-size // arena_module.PAGE) * arena_module.PAGE
            self.mapped = (arena_module.reserve(size, 3), size)
            self.array = arena_module.bytes_at(*self.mapped).view(dtype)[:count]

    def free(self) -> None:
        self.array = None
        if self.mapped:
            arena_module.release(*self.mapped)


class _Block:
    def __init__(self, address: int, size: int, granule: int, views: list[dict]):
        self.address, self.shift, self.views = address, granule.bit_length() - 1, views
        self.count = size >> self.shift
        self.flags = _Marks(self.count, np.uint8)
        self.writer = self.reader = None

    def track(self) -> None:
        if self.writer is None:
            self.writer, self.reader = _Marks(self.count, np.uint64), _Marks(self.count, np.uint64)

    def inside(self, offsets: np.ndarray) -> np.ndarray:
        """Which byte offsets are the first byte of a cell of some tensor on this block."""
        found = np.zeros(len(offsets), dtype=bool)
        for view in self.views:
            element, rest = np.divmod(offsets - view["start"], view["itemsize"])
            good = rest == 0
            for size, stride in zip(view["shape"], view["strides"]):
                index = np.minimum(element // stride, size - 1) if stride else 0
                good &= element >= 0
                element = element - index * stride
            found |= good & (element == 0)
        return found

    def free(self) -> None:
        for marks in (self.flags, self.writer, self.reader):
            if marks is not None:
                marks.free()


class Shadow:
    """Stands in for the interpreter's native module during a call; everything else is passed on to it."""

    def __init__(self, native, arena: arena_module.Arena):
        self._native, self._arena = native, arena
        self._base = np.uint64(arena.base)
        self.rules = frozenset(RULES)
        self.findings: list[dict] = []
        self.active = False
        self.launches = 0
        self._blocks: list[_Block] = []
        self._own: np.ndarray = np.zeros((0, 2), dtype=np.uint64)
        self._epoch = 0
        self._program = (0, 0, 0)
        self._number = 0

    def __getattr__(self, name):
        return getattr(self._native, name)

    # -- a call -----------------------------------------------------------------------------------------------------

    def begin(self, views: list[list[dict]], access: list[list[int]], rules) -> None:
        """Start watching a call. `views` are the tensors on each of the arena's blocks, `access` what their cells may be
        used for: runs of (block, byte, count, step, flags)."""
        self.end()
        self.rules, self.findings = frozenset(rules), []
        self._blocks = [_Block(b.address, b.size, min(v["itemsize"] for v in on), on)
                        for b, on in zip(self._arena.blocks, views)]
        for block, byte, count, step, flags in access:
            target = self._blocks[block]
            first = byte >> target.shift
            stride = max(step >> target.shift, 1)
            target.flags.array[first : first + (count - 1) * stride + 1 : stride] |= flags
            if flags & WRITE:
                target.track()
        self.active = True

    def end(self) -> None:
        for block in self._blocks:
            block.free()
        self._blocks, self.active = [], False

    def launch(self, grid: tuple[int, ...], own: list[tuple[int, int]]) -> bool:
        """Start a launch: a new race epoch. `own` are the address ranges of tensors that the subject allocated. Returns
        whether hardware takes it."""
        self._epoch += 1
        self.launches += 1
        self._own = np.array(sorted(own), dtype=np.uint64).reshape(-1, 2)
        x, y, z = grid
        refused = self.active and (x * y * z == 0 or y > 65535 or z > 65535 or x > 2**31 - 1)
        if refused:
            self._report("grid", None, 0, 0, detail=f"{(x, y, z)}")
        return not refused

    def program(self, index: tuple[int, int, int], number: int) -> None:
        self._program, self._number = index, number

    # -- the four functions -----------------------------------------------------------------------------------------

    def load(self, pointers, mask, other, dtype):
        if not self.active:
            return self._native.load(pointers, mask, other, dtype)
        mask, bad = self._examine(pointers, mask, np.dtype(dtype).itemsize, None)
        if len(bad):
            other = np.array(np.broadcast_to(other, pointers.shape), copy=True)
            other.reshape(-1)[bad] = poison(np.dtype(dtype))
        return self._native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        if self.active:
            mask, _ = self._examine(pointers, mask, value.dtype.itemsize, value)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        if self.active:
            mask, _ = self._examine(pointers, mask, value.dtype.itemsize, value, atomic=True)
        return self._native.atomic_rmw(op, pointers, value, mask, sem)

    def atomic_cas(self, pointers, compare, value, sem):
        if self.active:
            _, bad = self._examine(pointers, np.ones(pointers.shape, dtype=bool), value.dtype.itemsize, value, atomic=True)
            if len(bad):
                return np.array(compare, copy=True)
        return self._native.atomic_cas(pointers, compare, value, sem)

    # -- the rules --------------------------------------------------------------------------------------------------

    def _examine(self, pointers, mask, size, value, atomic=False):
        """Check every active lane; returns the mask without the lanes that broke a rule, and those lanes."""
        addresses = np.ascontiguousarray(pointers).reshape(-1)
        values = None if value is None else np.ascontiguousarray(np.broadcast_to(value, pointers.shape)).reshape(-1)
        lanes = None  # all of them
        if not mask.all():
            lanes = np.flatnonzero(mask)
            if not len(lanes):
                return mask, _NO_LANES
            addresses, values = addresses[lanes], None if values is None else values[lanes]
        slots = (addresses - self._base) >> _SLOT_BITS
        if slots[0] == slots[-1] and (slots == slots[0]).all():
            bad = self._in_slot(int(slots[0]), addresses, size, values, atomic)
        else:
            bad = np.zeros(len(addresses), dtype=bool)
            for slot in np.unique(slots):
                here = np.flatnonzero(slots == slot)
                wrong = self._in_slot(int(slot), addresses[here], size, None if values is None else values[here], atomic)
                bad[here] = False if wrong is None else wrong
        if bad is None or not bad.any():
            return mask, _NO_LANES
        lanes = np.flatnonzero(bad) if lanes is None else lanes[bad]
        mask = np.array(np.broadcast_to(mask, pointers.shape), copy=True)
        mask.reshape(-1)[lanes] = False
        return mask, lanes

    def _in_slot(self, slot: int, addresses, size: int, values, atomic: bool):
        """Which lanes break a rule, or None where none does."""
        if slot < len(self._blocks):
            return self._in_block(slot, addresses, size, values, atomic)
        return self._in_own(addresses, size, values is not None)

    def _in_block(self, slot: int, addresses, size: int, values, atomic: bool):
        block = self._blocks[slot]
        writing = values is not None
        needed = (WRITE | INIT if atomic else WRITE) if writing else INIT
        offsets = addresses.view(np.int64) - block.address
        granule = 1 << block.shift
        bad = None
        for part in range(0, max(size, granule), granule):
            cells = (offsets + part if part else offsets) >> block.shift
            good, flags = None, None  # good: all of them
            if cells.min() >= 0 and cells.max() < block.count:
                flags = block.flags.array[cells]
            if flags is None or (flags & needed != needed).any():
                wrong, good, flags = self._wrong(block, slot, cells, offsets, part, size, needed, writing, atomic)
                bad = wrong if bad is None else bad | wrong
            if block.writer is not None and "race" in self.rules:
                shared = None if writing and good is None else (flags & WRITE) != 0
                if shared is not None and good is not None:
                    shared &= good
                if shared is None:
                    self._order(block, slot, cells, offsets, size, addresses, values, atomic)
                elif shared.any():
                    self._order(block, slot, cells[shared], offsets[shared], size, addresses[shared],
                                None if values is None else values[shared], atomic)
            if writing:
                block.flags.array[cells if good is None else cells[good]] |= INIT
        return bad

    def _wrong(self, block: _Block, slot: int, cells, offsets, part: int, size: int, needed: int, writing: bool, atomic: bool):
        """Which lanes break a rule, which do not and lie on the block, and the flags of each lane's cell."""
        mapped = (cells >= 0) & (cells < block.count)
        flags = np.zeros(len(cells), dtype=np.uint8)
        flags[mapped] = block.flags.array[cells[mapped]]
        wrong = np.zeros(len(cells), dtype=bool)
        if ((flags & needed) != needed).any():
            wrong = self._broken(block, slot, flags, offsets, offsets + part, size, writing, atomic)
        return wrong, mapped & ~wrong, flags

    def _broken(self, block: _Block, slot: int, flags, offsets, bytes_, size: int, writing: bool, atomic: bool):
        """Which lanes break a rule, when some cell does not allow the access."""
        writable, initialised = (flags & WRITE) != 0, (flags & INIT) != 0
        inside = block.inside(bytes_)
        wrong = np.zeros(len(flags), dtype=bool)
        if writing:
            wrong |= self._break(slot, "write-outside", ~inside & ~writable, offsets, size)
            wrong |= self._break(slot, "write-input", inside & ~writable, offsets, size)
        else:
            wrong |= self._break(slot, "read-outside", ~inside & ~initialised, offsets, size)
            wrong |= self._break(slot, "read-forbidden", inside & ~initialised & ~writable, offsets, size)
        if not writing or atomic:
            wrong |= self._break(slot, "uninitialised", writable & ~initialised, offsets, size)
        return wrong

    def _break(self, slot: int, rule: str, lanes, offsets, size: int):
        """Record the first of `lanes` under `rule`; a rule that is off lets the lanes through."""
        if rule not in self.rules or not lanes.any():
            return np.zeros(len(lanes), dtype=bool)
        self._report(rule, slot, int(offsets[np.flatnonzero(lanes)[0]]), size)
        return lanes

    def _order(self, block: _Block, slot: int, cells, offsets, size, addresses, values, atomic: bool) -> None:
        """The race rule, for the cells that one access of the current program touches."""
        if not len(cells):
            return
        epoch = np.uint64(self._epoch << 32)
        me = epoch | np.uint64(_ATOMIC if atomic else self._number)
        writers, readers = block.writer.array[cells], block.reader.array[cells]
        others = (writers >> np.uint64(32) == np.uint64(self._epoch)) & (writers != me)
        if values is None:
            self._race(slot, others, offsets, size)
            block.reader.array[cells] = np.where(
                (readers >> np.uint64(32) == np.uint64(self._epoch)) & (readers != me), epoch | np.uint64(_MANY), me)
            return
        changed = np.ones(len(cells), dtype=bool)
        if not atomic:
            everything = np.ones(len(addresses), dtype=bool)
            now = self._native.load(addresses, everything, np.zeros(len(addresses), dtype=values.dtype), values.dtype)
            bits = values.view(f"u{values.dtype.itemsize}")
            changed = now.view(bits.dtype) != bits
            order = np.argsort(addresses, kind="stable")
            twice = (addresses[order][1:] == addresses[order][:-1]) & (bits[order][1:] != bits[order][:-1])
            if twice.any():
                self._report("race", slot, int(offsets[order[np.flatnonzero(twice)[0]]]), size)
        read_elsewhere = (readers >> np.uint64(32) == np.uint64(self._epoch)) & (readers != me)
        self._race(slot, (others | read_elsewhere) & changed, offsets, size)
        block.writer.array[cells[changed]] = me

    def _race(self, slot: int, lanes, offsets, size) -> None:
        if lanes.any():
            self._report("race", slot, int(offsets[np.flatnonzero(lanes)[0]]), size)

    def _in_own(self, addresses, size: int, writing: bool):
        """Tensors of the subject's own are only checked for their bounds."""
        rule = "write-outside" if writing else "read-outside"
        bad = np.ones(len(addresses), dtype=bool)
        if len(self._own):
            k = np.searchsorted(self._own[:, 0], addresses, side="right").astype(np.int64) - 1
            bad = (k < 0) | (addresses + np.uint64(size) > self._own[np.maximum(k, 0), 1])
        if rule not in self.rules or not bad.any():
            return None
        self._report(rule, None, 0, size)
        return bad

    def _report(self, rule: str, block: int | None, byte: int, size: int, detail: str = "") -> None:
        if rule not in self.rules:
            return
        where = source_line()
        for seen in self.findings:
            if (seen["rule"], seen["block"], seen["where"]) == (rule, block, where):
                seen["times"] += 1
                return
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append({"rule": rule, "block": block, "byte": byte, "size": size, "program": list(self._program),
                                  "where": where, "detail": detail, "times": 1})


def poison(dtype: np.dtype):
    """What a lane reads that nothing may depend on."""
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "b":
        return True
    return np.frombuffer(b"\x5a" * dtype.itemsize, dtype=dtype)[0]


def source_line() -> str:
    """The innermost line of kernel source on the stack: the first frame outside the tools below it."""
    if not _TOOLS:
        files = (sys.modules["triton"].__file__, np.__file__, __file__)
        _TOOLS.extend(os.path.dirname(os.path.abspath(f)) + os.sep for f in files)
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_TOOLS, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_TOOLS: list[str] = []
