//! What a GPU would fault on or silently get wrong, and errors on request.

use crate::gpu::{Gpu, code, float, in_child, ok, passes_in_child};
use cudarc::driver::sys;

#[test]
fn launches_beyond_the_limits_are_refused() {
    let gpu = Gpu::open();
    let at = gpu.alloc(4096).unwrap();
    let scale = [at, at, 0, float(1.0)];
    assert_eq!(gpu.launch("test_scale", 1, 1024, 0, &scale), Ok(()));
    assert_eq!(gpu.launch("test_scale", 1, 1025, 0, &scale), Err(1));
    assert_eq!(gpu.launch("test_scale", 0, 32, 0, &scale), Err(1), "an empty grid");
    assert_eq!(gpu.launch_grid("test_scale", [1, 65536, 1], 1, 0, &scale), Err(1));
    assert_eq!(gpu.launch("test_block", 1, 288, 2000, &[at, at]), Err(1), "more than the launch bounds");
    assert_eq!(gpu.launch("no_such_kernel", 1, 1, 0, &[]), Err(500));

    let shared = 100 << 10;
    assert_eq!(gpu.launch("test_fresh_shared", 1, 1, shared, &[at]), Err(1));
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let function = gpu.function("test_fresh_shared").unwrap();
    // SAFETY: the function is of a loaded module.
    let set = |bytes: i32| code(unsafe { sys::cuFuncSetAttribute(function, attribute, bytes) });
    assert_eq!(set(228 << 10), Err(1));
    set(shared as i32).unwrap();
    gpu.launch("test_fresh_shared", 1, 1, shared, &[at]).unwrap();
}

#[test]
fn a_thread_without_a_context_gets_an_error() {
    let _gpu = Gpu::open();
    let mut at = 0;
    // SAFETY: writes one pointer.
    let alone = std::thread::spawn(move || code(unsafe { sys::cuMemAlloc_v2(&mut at, 16) }));
    assert_eq!(alone.join().unwrap(), Err(201));
}

/// Launches `test_store` with this index on an allocation of `bytes`, which must break the context.
fn store_breaks_the_context(test: &str, bytes: usize, index: i64) {
    let run = in_child(test, &[], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(bytes).unwrap();
        let launched = gpu.launch("test_store", 1, 1, 0, &[at, index as u64]);
        // Next to the allocation there is no page to protect; its bytes are looked at when it is freed.
        assert_eq!(launched.and_then(|()| gpu.free(at)), Err(700));
        assert_eq!(gpu.synchronize(), Err(700), "the error stays");
        assert_eq!(gpu.alloc(16), Err(700));
    });
    assert!(run.is_none_or(|run| run.status.success()));
}

#[test]
fn a_store_past_the_end_is_caught() {
    store_breaks_the_context("misuse::a_store_past_the_end_is_caught", 1024, 256);
}

#[test]
fn a_store_just_past_an_odd_end_is_caught() {
    store_breaks_the_context("misuse::a_store_just_past_an_odd_end_is_caught", 100, 25);
}

#[test]
fn a_store_before_the_start_is_caught() {
    store_breaks_the_context("misuse::a_store_before_the_start_is_caught", 1024, -1);
}

#[test]
fn a_fault_names_the_kernel_and_the_thread() {
    let test = "misuse::a_fault_names_the_kernel_and_the_thread";
    let Some(run) = in_child(test, &[], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(1024).unwrap();
        assert_eq!(gpu.launch("test_scale", 2, 256, 0, &[at, at, 512, 0]), Err(700));
    }) else {
        return;
    };
    assert!(run.status.success(), "{}", run.status);
    let text = String::from_utf8_lossy(&run.stderr);
    assert!(text.contains("kernel test_scale, block (1,0,0), thread (0,0,0): illegal address"), "{text}");
}

#[test]
fn a_misaligned_load_is_caught() {
    passes_in_child("misuse::a_misaligned_load_is_caught", &[], || {
        let gpu = Gpu::open();
        let at = gpu.upload(&[0.0f32; 16]);
        gpu.launch("test_load16", 1, 1, 0, &[at, at + 16]).unwrap();
        assert_eq!(gpu.launch("test_load16", 1, 1, 0, &[at, at + 4]), Err(716));
    });
}

#[test]
fn an_index_outside_a_shared_array_is_caught() {
    passes_in_child("misuse::an_index_outside_a_shared_array_is_caught", &[], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(16).unwrap();
        gpu.launch("test_index", 1, 1, 0, &[at, 7]).unwrap();
        assert_eq!(gpu.launch("test_index", 1, 1, 0, &[at, 8]), Err(716));
    });
}

#[test]
fn memory_of_the_host_is_no_argument() {
    passes_in_child("misuse::memory_of_the_host_is_no_argument", &[], || {
        let gpu = Gpu::open();
        let host = [0.0f32; 4];
        assert_eq!(gpu.launch("test_store", 1, 1, 0, &[host.as_ptr() as u64, 0]), Err(700));
    });
}

#[test]
fn a_barrier_that_some_threads_never_reach_ends_the_process() {
    let test = "misuse::a_barrier_that_some_threads_never_reach_ends_the_process";
    let Some(run) = in_child(test, &[], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(16).unwrap();
        let _ = gpu.launch("test_divergent", 1, 64, 0, &[at]);
    }) else {
        return;
    };
    assert!(!run.status.success());
    let text = String::from_utf8_lossy(&run.stderr);
    assert!(text.contains("test_divergent") && text.contains("divergent barrier in warp 0"), "{text}");
}

#[test]
fn errors_come_on_request() {
    let requests = "cuMemAlloc:2=2,cuLaunchKernel(test_scale):2=700";
    passes_in_child("misuse::errors_come_on_request", &[("SIMULATED_CUDA_FAIL", requests)], || {
        let gpu = Gpu::open();
        let at = gpu.alloc(1024).unwrap();
        assert_eq!(gpu.alloc(16), Err(2));
        gpu.alloc(16).unwrap();
        for _ in 0..3 {
            gpu.launch("test_store", 1, 1, 0, &[at, 0]).unwrap();
        }
        gpu.launch("test_scale", 1, 1, 0, &[at, at, 1, 0]).unwrap();
        assert_eq!(gpu.launch("test_scale", 1, 1, 0, &[at, at, 1, 0]), Err(700));
        assert_eq!(gpu.launch("test_store", 1, 1, 0, &[at, 0]), Err(700), "the error stays");
    });
}

#[test]
fn a_kernel_that_the_ptx_lacks_is_not_found() {
    let gpu = Gpu::open();
    let ptx = c".version 9.0\n.target sm_80\n.visible .entry test_store(\n.param .u64 a,\n.param .u64 b\n)\n\
                .visible .entry test_block(\n.param .u64 a\n)\n";
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: C strings and live variables.
    unsafe {
        ok(sys::cuModuleLoadData(&mut module, ptx.as_ptr().cast()));
        ok(sys::cuModuleGetFunction(&mut function, module, c"test_store".as_ptr()));
        assert_eq!(code(sys::cuModuleGetFunction(&mut function, module, c"test_scale".as_ptr())), Err(500));
        let other_parameters = code(sys::cuModuleGetFunction(&mut function, module, c"test_block".as_ptr()));
        assert_eq!(other_parameters, Err(200), "the PTX is of another source");
        ok(sys::cuModuleUnload(module));
        assert_eq!(code(sys::cuModuleLoadData(&mut module, c".version 9.1".as_ptr().cast())), Err(222));
    }
    assert!(gpu.function("test_scale").is_ok());
}
