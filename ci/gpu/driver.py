"""The CUDA driver by ctypes: memory, handles of memory, and what a process sees that opens them. Standard library only.

Every call that is not asked about raises CudaError with the driver's own name for what went wrong.
"""
import ctypes
import hashlib
import mmap

IPC_HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1     # the only flag that cuIpcOpenMemHandle knows
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class CudaError(Exception):
    """A call of the driver failed."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES)]


class Driver:
    """A context on one device, current in the thread that made it."""

    def __init__(self, uuid=None):
        """The device of that UUID (`GPU-…`), or the first."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise CudaError(f"libcuda.so.1: {e}") from e
        self.call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            self.device = ctypes.c_int()
            self.call("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(ordinal))
            if uuid in (None, self.uuid()):
                break
        else:
            raise CudaError(f"none of {count.value} devices is {uuid or 'there'}")
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)

    def result(self, function, *arguments):
        """The driver's word for the outcome of a call, `CUDA_SUCCESS` if it was one."""
        code = getattr(self._cuda, function)(*arguments)
        name = ctypes.c_char_p()
        self._cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
        return (name.value or b"unknown").decode()

    def call(self, function, *arguments):
        code = getattr(self._cuda, function)(*arguments)
        if code != 0:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
            raise CudaError(f"{function}: {(name.value or b'unknown').decode()} ({code})")

    def uuid(self):
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid_v2", ctypes.byref(raw), self.device)
        h = bytes(raw).hex()
        return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def name(self):
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, ctypes.c_int(256), self.device)
        return text.value.decode()

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def alloc(self, size):
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer):
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def write(self, pointer, data):
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), ctypes.c_char_p(data), ctypes.c_size_t(len(data)))

    def read(self, pointer, size):
        data = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(pointer), ctypes.c_size_t(size))
        return data.raw

    def handle(self, pointer):
        handle = IpcHandle()
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle)

    def open(self, handle):
        pointer = ctypes.c_uint64()
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), IpcHandle.from_buffer_copy(handle),
                  ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS))
        return pointer.value

    def close(self, pointer):
        self.call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def synchronize(self):
        self.call("cuCtxSynchronize")


def digest(data):
    """Of a tensor's bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digests_of(manifest):
    """{tensor: digest}, read from the memory that a manifest describes, opened here by its handles."""
    allocations = manifest["allocations"]
    found, opened, driver = {}, [], None
    for allocation in allocations:
        if allocation["kind"] == "file":
            with open(allocation["path"], "rb") as file:
                memory = mmap.mmap(file.fileno(), allocation["bytes"], prot=mmap.PROT_READ)
            opened.append(lambda at, size, memory=memory: memory[at:at + size])
        else:
            driver = driver or Driver(allocation["device"])
            base = driver.open(bytes.fromhex(allocation["handle"]))
            opened.append(lambda at, size, base=base: driver.read(base + at, size))
    for tensor in manifest["tensors"]:
        size = ITEM_BYTES[tensor["dtype"]]
        for n in tensor["shape"]:
            size *= n
        found[tensor["name"]] = digest(opened[tensor["allocation"]](tensor["offset"], size))
    return found
