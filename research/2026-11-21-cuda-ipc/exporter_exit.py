#!/usr/bin/env python3
"""What a process sees that holds another's CUDA memory open, when that other ends.

usage: exporter_exit.py [--json FILE] [--bytes N]       needs an NVIDIA GPU and its driver; standard library only

For each way in which the exporter can end (it exits, it is killed, it frees the memory and lives on), an importer that has
opened the memory by its handle keeps reading, writing and filling it, once a millisecond, from before that moment until
two seconds after it. Written down are: every change of what a call returns, with its time from the exporter's end; whether
what was written is read back; whether memory that a third process then takes and fills shows through; whether the handle
can still be opened; how long the driver says that opened memory is; how much memory is free meanwhile and after; what closing returns; whether the importer's context
still works after all that.
"""
import argparse
import ctypes
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "ci" / "gpu"))
from driver import CudaError, Driver, IpcHandle

SIZE = 256 << 20               # unless --bytes says another
PATTERN = 0x5A5A1234
FOREIGN = 0xABABABAB
FOREIGN_ALLOCATIONS = 16       # of as many bytes each
BEFORE_S, AFTER_S = 0.3, 2.0
DEVICE_ORDINAL = 9             # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
PAGEABLE_MEMORY_ACCESS = 88    # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS
WAYS = ("exits", "is killed", "frees it")


def fill(driver, pointer, word, words):
    return driver.result("cuMemsetD32_v2", ctypes.c_uint64(pointer), ctypes.c_uint(word), ctypes.c_size_t(words))


def word_at(driver, pointer):
    """(the driver's word, the word there)."""
    value = ctypes.c_uint32()
    result = driver.result("cuMemcpyDtoH_v2", ctypes.byref(value), ctypes.c_uint64(pointer), ctypes.c_size_t(4))
    return result, value.value


def extent(driver, pointer):
    """What the driver says of the allocation that an opened pointer lies in."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    result = driver.result("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
    ordinal = ctypes.c_int(-1)
    of_device = driver.result("cuPointerGetAttribute", ctypes.byref(ordinal), ctypes.c_int(DEVICE_ORDINAL),
                              ctypes.c_uint64(pointer))
    return dict(range=result, begins_before=pointer - base.value if base.value else None, bytes=size.value,
                device=of_device, ordinal=ordinal.value)


def exporter(_):
    """Prints a handle, and does what the first line of its input says."""
    driver = Driver()
    pointer = driver.alloc(SIZE)
    fill(driver, pointer, PATTERN, SIZE // 4)
    driver.synchronize()
    print(driver.handle(pointer).hex(), flush=True)
    if sys.stdin.readline().strip() == "frees it":
        driver.free(pointer)
        print("freed", flush=True)
        sys.stdin.readline()


def importer(handle):
    """Uses the memory until its input ends, then prints what it saw. Times are of the monotonic clock."""
    driver = Driver()
    pointer = driver.open(bytes.fromhex(handle))
    print("opened", flush=True)
    opened = extent(driver, pointer)
    changes, last, rounds, lost = [], {}, 0, 0

    def note(call, result):
        if last.get(call) != result:
            last[call] = result
            changes.append([time.monotonic(), call, result])

    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
    while not over.is_set():
        rounds += 1
        note("fill", fill(driver, pointer, rounds, 16))
        note("read", (found := word_at(driver, pointer))[0])
        lost += found != ("CUDA_SUCCESS", rounds)
        note("read at the end of the memory", (end := word_at(driver, pointer + SIZE - 4))[0])
        if end[0] == "CUDA_SUCCESS":
            note("word at the end", f"{end[1]:08x}")
        note("synchronize", driver.result("cuCtxSynchronize"))
        time.sleep(0.001)
    note("close", driver.result("cuIpcCloseMemHandle", ctypes.c_uint64(pointer)))
    note("close again", driver.result("cuIpcCloseMemHandle", ctypes.c_uint64(pointer)))
    fresh = ctypes.c_uint64()
    note("allocate after that", driver.result("cuMemAlloc_v2", ctypes.byref(fresh), ctypes.c_size_t(1 << 20)))
    note("synchronize after that", driver.result("cuCtxSynchronize"))
    print(json.dumps(dict(rounds=rounds, writes_not_read_back=lost, changes=changes, opened=opened)), flush=True)
    sys.stdin.readline()


def opener(handle):
    """Opens a handle late."""
    driver, pointer = Driver(), ctypes.c_uint64()
    result = driver.result("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), IpcHandle.from_buffer_copy(bytes.fromhex(handle)),
                           ctypes.c_uint(1))
    print(json.dumps(dict(open=result)))


def stranger(_):
    """Takes memory and fills it, then says so and keeps it until its input ends."""
    driver, taken = Driver(), 0
    for _ in range(FOREIGN_ALLOCATIONS):
        try:
            fill(driver, driver.alloc(SIZE), FOREIGN, SIZE // 4)
            taken += 1
        except CudaError:
            break
    driver.synchronize()
    print(json.dumps(dict(taken_bytes=taken * SIZE)), flush=True)
    sys.stdin.readline()


def free_memory(_):
    print(json.dumps(dict(free=Driver().free_bytes())))


ROLES = {role.__name__: role for role in (exporter, importer, opener, stranger, free_memory)}


class Child:
    """This script in one of its roles."""

    def __init__(self, role, handle=""):
        self.process = subprocess.Popen([sys.executable, __file__, "--role", role, "--handle", handle, "--bytes", str(SIZE)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.role = role

    def line(self):
        text = self.process.stdout.readline()
        if not text:
            raise SystemExit(f"the {self.role} ended with status {self.process.wait()} without a word")
        return text.strip()

    def tell(self, word=""):
        print(word, file=self.process.stdin, flush=True)

    def end(self):
        self.process.stdin.close()
        return self.process.wait(20)


def asked(role, handle=""):
    child = Child(role, handle)
    answer = json.loads(child.line())
    child.end()
    return answer


def one_way(way):
    """What is seen when the exporter ends in this way."""
    free_before = asked("free_memory")["free"]
    giver = Child("exporter")
    handle = giver.line()
    holder = Child("importer", handle)
    holder.line()
    time.sleep(BEFORE_S)
    if way == "is killed":
        giver.process.send_signal(signal.SIGKILL)
    else:
        giver.tell(way)
    end = time.monotonic()
    if way == "frees it":
        giver.line()
    else:
        giver.process.wait(20)
    dead = time.monotonic()
    free_held = asked("free_memory")["free"]
    late = asked("opener", handle)["open"]
    other = Child("stranger")
    taken = json.loads(other.line())["taken_bytes"]
    time.sleep(max(0.0, end + AFTER_S - time.monotonic()))
    holder.tell()
    seen = json.loads(holder.line())
    other.end()
    free_closed = asked("free_memory")["free"]
    holder.end()
    if giver.process.poll() is None:
        giver.end()
    free_after = asked("free_memory")["free"]
    return dict(
        exporter_ended_after_ms=round(1e3 * (dead - end), 1), opened=seen["opened"], rounds=seen["rounds"],
        writes_not_read_back=seen["writes_not_read_back"], handle_opened_later=late, taken_by_a_stranger_bytes=taken,
        changes=[dict(ms=round(1e3 * (at - end), 1), call=call, result=result) for at, call, result in seen["changes"]],
        free_bytes=dict(before=free_before, exporter_gone_importer_open=free_held, importer_closed=free_closed,
                        everything_ended=free_after))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="where the findings go; default: printed alone")
    parser.add_argument("--bytes", type=int, default=SIZE, help="size of the memory; default %(default)s")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--handle", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    globals()["SIZE"] = options.bytes
    if options.role:
        return ROLES[options.role](options.handle)
    driver = Driver()
    pageable = ctypes.c_int()
    driver.call("cuDeviceGetAttribute", ctypes.byref(pageable), ctypes.c_int(PAGEABLE_MEMORY_ACCESS), driver.device)
    found = dict(device=driver.name(), uuid=driver.uuid(), reads_pageable_memory=bool(pageable.value), size_bytes=SIZE, ways={})
    for way in WAYS:
        found["ways"][way] = one_way(way)
        print(f"the exporter {way}:", json.dumps(found["ways"][way], indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
