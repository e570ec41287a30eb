"""The driver is a fake: what is asked of it, and what becomes of its answers."""

import ctypes
import unittest

from apollod.cuda import CudaDriver, Place, Span, places
from apollod.errors import ExportError

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
        with self.assertRaisesRegex(ExportError, "`b`.*sleep mode.*cumem-allocator.*expandable_segments:False"):
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


if __name__ == "__main__":
    unittest.main()
