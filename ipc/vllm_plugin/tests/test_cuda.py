"""What is asked of the CUDA driver, and what becomes of its answers: of a fake, and of the simulated driver that the
daemon's tests are built with (``compute/simulated_driver``), whose device memory another process opens by the handles.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from apollod.cuda import CudaDriver, Place, Span, places
from apollod.errors import ExportError
from apollod.manifest import document
from apollod.weights import cuda_weights

UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


class FakeDriver:
    """Allocations by base: size and whether they have a handle."""

    def __init__(self, allocations):
        self.allocations = allocations
        self.handles = []

    def address_range(self, pointer):
        return next((base, size) for base, (size, _) in self.allocations.items() if base <= pointer < base + size)

    def is_ipc_capable(self, pointer):
        return self.allocations[self.address_range(pointer)[0]][1]

    def ipc_handle(self, base):
        self.handles.append(base)
        return base.to_bytes(64, "big")

    def device_uuid(self, pointer):
        return UUID


class Places(unittest.TestCase):
    def test_small_tensors_share_one_base_and_one_handle(self):
        driver = FakeDriver({0x1000: (0x1000, True), 0x8000: (0x100, True)})
        spans = [Span("a", 0x1000, 16), Span("b", 0x8010, 16), Span("c", 0x1200, 0xE00), Span("d", 0, 0)]
        allocations, found = places(spans, driver)
        self.assertEqual(found, [Place(0, 0), Place(1, 0x10), Place(0, 0x200), Place(0, 0)])
        self.assertEqual(driver.handles, [0x1000, 0x8000])
        self.assertEqual(
            allocations[0],
            {"kind": "cuda_ipc", "handle": f"{0x1000:0128x}", "bytes": 0x1000, "device": UUID},
        )

    def test_memory_without_a_handle_is_refused_with_the_settings_to_change(self):
        driver = FakeDriver({0x1000: (0x1000, True), 0x8000: (0x100, False)})
        with self.assertRaisesRegex(ExportError, "`b`.*sleep mode.*cumem-allocator.*backend:native,expandable_segments:False"):
            places([Span("a", 0x1000, 16), Span("b", 0x8010, 16)], driver)

    def test_a_tensor_beyond_its_allocation_is_refused(self):
        driver = FakeDriver({0x1000: (0x1000, True)})
        with self.assertRaisesRegex(ExportError, "`a` reaches beyond"):
            places([Span("a", 0x1FF8, 16)], driver)


class FakeLibrary:
    """libcuda.so.1 as ctypes sees it: writes through the pointers that it is given."""

    def __init__(self, result=0):
        self.result = result

    def cuMemGetAddressRange_v2(self, base, size, pointer):
        base._obj.value, size._obj.value = pointer.value & ~0xFFF, 0x1000
        return self.result

    def cuPointerGetAttribute(self, data, attribute, pointer):
        data._obj.value = {10: pointer.value & 1, 9: 3}[attribute.value]
        return self.result

    def cuIpcGetMemHandle(self, handle, base):
        handle._obj[:] = [base.value & 0xFF] * 64
        return self.result

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal.value + 100
        return self.result

    def cuDeviceGetUuid_v2(self, uuid, device):
        assert device.value == 103
        uuid._obj[:] = range(16)
        return self.result

    def cuGetErrorName(self, result, name):
        name._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0


class Calls(unittest.TestCase):
    def test_answers_come_back_through_the_pointers(self):
        driver = CudaDriver(FakeLibrary())
        pointer = 0x7F00_1234_5678
        self.assertEqual(driver.address_range(pointer), (0x7F00_1234_5000, 0x1000))
        self.assertFalse(driver.is_ipc_capable(pointer))
        self.assertTrue(driver.is_ipc_capable(pointer + 1))
        self.assertEqual(driver.ipc_handle(0x7F), b"\x7f" * 64)
        self.assertEqual(driver.device_uuid(pointer), UUID)

    def test_a_failure_is_told_by_function_and_name(self):
        with self.assertRaisesRegex(ExportError, r"cuIpcGetMemHandle failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
            CudaDriver(FakeLibrary(result=1)).ipc_handle(0)

    def test_a_machine_without_a_driver_says_so(self):
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            with self.assertRaisesRegex(ExportError, "driver cannot be loaded"):
                CudaDriver()


def simulated_driver():
    """The newest that cargo has built, or what APOLLOD_SIMULATED_CUDA names; None if there is none."""
    if named := os.environ.get("APOLLOD_SIMULATED_CUDA"):
        return Path(named)
    target = Path(__file__).resolve().parents[3] / "target"
    built = target.glob("*/build/simulated_driver-*/out/libcuda.so.1")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


class IpcMemHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


def enter_context(library):
    """Makes the primary context of device 0 current in this thread."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    for result in (
        library.cuInit(0),
        library.cuDeviceGet(ctypes.byref(device), 0),
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        library.cuCtxSetCurrent(context),
    ):
        assert result == 0, result


def import_and_write():
    """What a trainer does, in a process of its own: the manifest on stdin, its tensor becomes 7s."""
    manifest = json.load(sys.stdin)
    library = ctypes.CDLL(str(simulated_driver()))
    enter_context(library)
    (tensor,), allocations = manifest["tensors"], manifest["allocations"]
    handle = IpcMemHandle.from_buffer_copy(bytes.fromhex(allocations[tensor["allocation"]]["handle"]))
    base = ctypes.c_uint64()
    assert library.cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, 1) == 0
    data = bytes([7]) * (2 * tensor["shape"][0])
    assert library.cuMemcpyHtoD_v2(ctypes.c_uint64(base.value + tensor["offset"]), data, ctypes.c_size_t(len(data))) == 0
    assert library.cuIpcCloseMemHandle(base) == 0


@unittest.skipUnless(simulated_driver(), "the simulated driver is not built: cargo test -p ipc --test cuda --no-run")
class Simulated(unittest.TestCase):
    """The real calls, on a driver that answers as CUDA's does."""

    SIZE = 1 << 20

    def setUp(self):
        self.library = ctypes.CDLL(str(simulated_driver()))
        enter_context(self.library)
        base = ctypes.c_uint64()
        self.assertEqual(self.library.cuMemAlloc_v2(ctypes.byref(base), ctypes.c_size_t(self.SIZE)), 0)
        self.base = base.value
        self.addCleanup(lambda: self.library.cuMemFree_v2(ctypes.c_uint64(self.base)))

    def read(self, offset, size):
        data = ctypes.create_string_buffer(size)
        source = ctypes.c_uint64(self.base + offset)
        self.assertEqual(self.library.cuMemcpyDtoH_v2(data, source, ctypes.c_size_t(size)), 0)
        return data.raw

    def test_every_question_is_answered(self):
        driver = CudaDriver(self.library)
        pointer = self.base + 5000
        self.assertTrue(driver.is_ipc_capable(pointer))
        self.assertEqual(driver.address_range(pointer), (self.base, self.SIZE))
        self.assertEqual(len(driver.ipc_handle(self.base)), 64)
        self.assertEqual(driver.device_uuid(pointer), "GPU-73696d75-6c61-7465-6420-475055203000")

    def test_a_pointer_of_nobody_is_an_error_and_not_an_answer(self):
        with self.assertRaisesRegex(ExportError, r"cuMemGetAddressRange_v2 failed with CUDA_ERROR_NOT_FOUND \(500\)"):
            CudaDriver(self.library).address_range(0x1000)

    def test_a_thread_without_a_context_is_told(self):
        # The exporter makes the context current first (cuda_weights); this is why.
        errors = []

        def ask():
            try:
                CudaDriver(self.library).address_range(self.base)
            except ExportError as error:
                errors.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        self.assertRegex(errors[0], "CUDA_ERROR_INVALID_CONTEXT")

    def test_another_process_writes_what_the_manifest_describes(self):
        bias = SimpleNamespace(data_ptr=lambda: self.base + 512, shape=(100,), stride=lambda: (1,))
        bias.itemsize, bias.dtype = 2, torch.bfloat16
        calls = []
        with (
            mock.patch("apollod.weights.parameters_of", lambda model: {"bias": bias}),
            mock.patch("torch.cuda.device", lambda device: calls.append("device") or mock.MagicMock()),
            mock.patch("torch.cuda.synchronize", lambda device: calls.append("synchronize")),
        ):
            weights = cuda_weights(None, torch.device("cuda:0"), CudaDriver(self.library))
        self.assertEqual(calls, ["device", "synchronize"])
        manifest = document(weights, model_dir="/")
        self.assertEqual(manifest["tensors"][0]["offset"], 512)
        command = [sys.executable, __file__, "import-and-write"]
        subprocess.run(command, input=json.dumps(manifest).encode(), check=True)
        self.assertEqual(self.read(510, 204), b"\xff\xff" + bytes([7]) * 200 + b"\xff\xff")


if __name__ == "__main__":
    import_and_write() if sys.argv[1:] == ["import-and-write"] else unittest.main()
