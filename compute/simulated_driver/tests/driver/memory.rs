//! Memory: its limits, and how another process opens it.

use crate::gpu::{Gpu, code, in_child, ok, passes_in_child};
use cudarc::driver::sys;

const HANDLE: &str = "SIMULATED_DRIVER_TEST_HANDLE";

fn handle(at: u64) -> Result<sys::CUipcMemHandle, u32> {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: writes one handle.
    code(unsafe { sys::cuIpcGetMemHandle(&mut handle, at) }).map(|()| handle)
}

fn open(handle: sys::CUipcMemHandle) -> Result<u64, u32> {
    let mut at = 0;
    // SAFETY: writes one pointer.
    code(unsafe { sys::cuIpcOpenMemHandle_v2(&mut at, handle, 1) }).map(|()| at)
}

fn close(at: u64) -> Result<(), u32> {
    // SAFETY: the caller uses `at` no more.
    code(unsafe { sys::cuIpcCloseMemHandle(at) })
}

fn to_text(handle: sys::CUipcMemHandle) -> String {
    handle.reserved.iter().map(|&b| format!("{:02x}", b as u8)).collect()
}

fn from_text(text: &str) -> sys::CUipcMemHandle {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    for (i, byte) in handle.reserved.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap() as _;
    }
    handle
}

#[test]
fn another_process_opens_and_writes_memory() {
    let test = "memory::another_process_opens_and_writes_memory";
    let gpu = Gpu::open();
    // Not the start of the allocation, and no round size: an importer gets the whole.
    let at = gpu.upload(&[1u32; 1001]);
    let text = to_text(handle(at + 40).unwrap());
    let run = in_child(test, &[(HANDLE, &text)], || {
        let handle = from_text(&std::env::var(HANDLE).unwrap());
        let imported = open(handle).unwrap();
        assert_eq!(open(handle), Ok(imported), "a second opening counts");
        assert_eq!(gpu.read::<u32>(imported, 1001), [1; 1001]);
        gpu.write(imported + 4000, &[2u32]);
        assert_eq!(gpu.free(imported), Err(1), "it is not ours");
        close(imported).unwrap();
        assert_eq!(gpu.read::<u32>(imported + 4000, 1), [2], "it is still open once");
        close(imported).unwrap();
        assert_eq!(close(imported), Err(1));
    });
    let Some(run) = run else { return };
    assert!(run.status.success(), "{}", run.status);
    assert_eq!(gpu.read::<u32>(at, 1001), [&[1; 1000][..], &[2]].concat());
}

#[test]
fn a_handle_of_this_process_or_of_freed_memory_is_refused() {
    let test = "memory::a_handle_of_this_process_or_of_freed_memory_is_refused";
    let gpu = Gpu::open();
    let at = gpu.alloc(100).unwrap();
    let handle = handle(at).unwrap();
    assert_eq!(open(handle), Err(201));
    gpu.free(at).unwrap();
    passes_in_child(test, &[(HANDLE, &to_text(handle))], || {
        assert_eq!(open(from_text(&std::env::var(HANDLE).unwrap())), Err(1));
    });
}

#[test]
fn an_allocation_knows_its_range() {
    let gpu = Gpu::open();
    let at = gpu.alloc(100).unwrap();
    assert_eq!(at % 256, 0);
    let (mut base, mut size) = (0, 0);
    // SAFETY: writes one pointer and one size.
    ok(unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut size, at + 99) });
    assert_eq!((base, size), (at, 100));
    // SAFETY: as above.
    assert_eq!(code(unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut size, at + 100) }), Err(500));
    let (mut capable, capability) = (0u32, sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
    // SAFETY: writes a bool.
    ok(unsafe { sys::cuPointerGetAttribute((&raw mut capable).cast(), capability, at) });
    assert_eq!(capable, 1);
    gpu.free(at).unwrap();
    assert_eq!(gpu.free(at), Err(1), "freed twice");
}

#[test]
fn a_copy_outside_an_allocation_is_refused() {
    let gpu = Gpu::open();
    let (at, host) = (gpu.alloc(100).unwrap(), [0u8; 101]);
    // SAFETY: the host's end is as long as is said.
    let copy = |to, n| code(unsafe { sys::cuMemcpyHtoDAsync_v2(to, host.as_ptr().cast(), n, gpu.stream) });
    assert_eq!(copy(at, 100), Ok(()));
    assert_eq!(copy(at, 101), Err(1));
    assert_eq!(copy(at + 1, 100), Err(1));
    assert_eq!(copy(host.as_ptr() as u64, 1), Err(1));
}

#[test]
fn memory_runs_out() {
    passes_in_child("memory::memory_runs_out", &[("SIMULATED_CUDA_MEMORY", "1000000")], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(600_000).unwrap();
        assert_eq!(gpu.alloc(600_000), Err(2));
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        ok(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) });
        assert_eq!((free, total), (400_000, 1_000_000));
        gpu.free(at).unwrap();
        gpu.alloc(600_000).unwrap();
    });
}

#[test]
fn a_synchronous_copy_to_the_device_has_only_read_its_source() {
    let late = [("SIMULATED_CUDA_LATE", "1")];
    passes_in_child("memory::a_synchronous_copy_to_the_device_has_only_read_its_source", &late, || {
        let gpu = Gpu::open();
        let (at, mut source) = (gpu.alloc(4).unwrap(), 7u32);
        // SAFETY: as many bytes at either end.
        ok(unsafe { sys::cuMemcpyHtoD_v2(at, (&raw const source).cast(), 4) });
        source += 1;
        assert_eq!(gpu.read::<u32>(at, 1), [u32::MAX], "a stream that does not block is not waited for by it");
        // SAFETY: nothing to prove.
        ok(unsafe { sys::cuCtxSynchronize() });
        assert_eq!(gpu.read::<u32>(at, 1), [source - 1]);
    });
}

#[test]
fn a_device_that_reads_pageable_memory_reads_it_when_the_copy_runs() {
    let late = [("SIMULATED_CUDA_LATE", "1"), ("SIMULATED_CUDA_PAGEABLE", "1")];
    passes_in_child("memory::a_device_that_reads_pageable_memory_reads_it_when_the_copy_runs", &late, || {
        let gpu = Gpu::open();
        let (at, mut source) = (gpu.alloc(4).unwrap(), [7u32]);
        gpu.write(at, &source);
        std::hint::black_box(&mut source)[0] = 8;
        assert_eq!(gpu.read::<u32>(at, 1), [8]);
    });
}

#[test]
fn late_work_is_done_when_somebody_waits() {
    passes_in_child("memory::late_work_is_done_when_somebody_waits", &[("SIMULATED_CUDA_LATE", "1")], || {
        let gpu = Gpu::open();
        let (at, mut pinned) = (gpu.upload(&[7u32]), std::ptr::null_mut());
        // SAFETY: the pinned memory holds one word.
        unsafe {
            ok(sys::cuMemHostAlloc(&mut pinned, 4, 0));
            ok(sys::cuMemcpyDtoHAsync_v2(pinned, at, 4, gpu.stream));
            assert_eq!(pinned.cast::<u32>().read(), u32::MAX, "nobody has waited yet");
            assert_eq!(code(sys::cuStreamQuery(gpu.stream)), Err(600));
            gpu.synchronize().unwrap();
            assert_eq!(pinned.cast::<u32>().read(), 7);
        }
    });
}
