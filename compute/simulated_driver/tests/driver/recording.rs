//! Recorded work: replayed as often as asked, on what memory holds then.

use crate::gpu::{Gpu, code, float, ok};
use cudarc::driver::sys::{self, CUstreamCaptureMode as Mode};

fn begin(gpu: &Gpu, mode: Mode) {
    // SAFETY: the stream is alive.
    ok(unsafe { sys::cuStreamBeginCapture_v2(gpu.stream, mode) });
}

fn end(gpu: &Gpu) -> Result<sys::CUgraph, u32> {
    let mut graph = std::ptr::null_mut();
    // SAFETY: the stream is alive.
    code(unsafe { sys::cuStreamEndCapture(gpu.stream, &mut graph) }).map(|()| graph)
}

#[test]
fn a_graph_replays_what_was_recorded() {
    let gpu = Gpu::open();
    let (a, b, c) = (gpu.upload(&[1.0f32; 64]), gpu.upload(&[0.0f32; 64]), gpu.upload(&[0.0f32; 64]));
    gpu.synchronize().unwrap();
    begin(&gpu, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    gpu.launch("test_scale", 1, 64, 0, &[b, a, 64, float(3.0)]).unwrap();
    // SAFETY: both ends are allocations of this test.
    ok(unsafe { sys::cuMemcpyDtoDAsync_v2(c, b, 256, gpu.stream) });
    // SAFETY: as above.
    ok(unsafe { sys::cuMemsetD32Async(b, 0, 64, gpu.stream) });
    let graph = end(&gpu).unwrap();
    assert_eq!(gpu.read::<f32>(c, 64), [0.0; 64], "recorded work ran");

    let (mut nodes, mut executable) = (0, std::ptr::null_mut());
    // SAFETY: the graph is alive, and may go once it is instantiated.
    unsafe {
        ok(sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes));
        ok(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        ok(sys::cuGraphDestroy(graph));
    }
    assert_eq!(nodes, 3);
    for value in [1.0f32, -7.0] {
        gpu.write(a, &[value; 64]);
        // SAFETY: the executable graph and its memory are alive.
        ok(unsafe { sys::cuGraphLaunch(executable, gpu.stream) });
        assert_eq!(gpu.read::<f32>(c, 64), [3.0 * value; 64]);
        assert_eq!(gpu.read::<f32>(b, 64), [0.0; 64]);
    }
    // SAFETY: not used any more.
    ok(unsafe { sys::cuGraphExecDestroy(executable) });
}

#[test]
fn what_cannot_be_recorded_spoils_the_recording() {
    let gpu = Gpu::open();
    let at = gpu.upload(&[0u32; 4]);
    let from = [1u32; 4];
    // SAFETY: the host's end is a live array.
    let pageable = || unsafe { sys::cuMemcpyHtoDAsync_v2(at, from.as_ptr().cast(), 16, gpu.stream) };
    // SAFETY: as above.
    let at_once = || unsafe { sys::cuMemcpyHtoD_v2(at, from.as_ptr().cast(), 16) };
    type Call<'a> = &'a dyn Fn() -> Result<(), u32>;
    let calls: [(&str, Call); 5] = [
        ("synchronize", &|| gpu.synchronize()),
        ("allocate", &|| gpu.alloc(16).map(|_| ())),
        ("pageable copy", &|| code(pageable())),
        ("synchronous copy", &|| code(at_once())),
        // SAFETY: nothing to prove.
        ("whole context", &|| code(unsafe { sys::cuCtxSynchronize() })),
    ];
    for (name, call) in calls {
        begin(&gpu, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        assert_eq!(call(), Err(900), "{name}");
        assert_eq!(gpu.launch("test_scale", 1, 1, 0, &[at, at, 1, 0]), Err(901), "{name}");
        assert_eq!(end(&gpu).err(), Some(901), "{name}");
    }
    assert_eq!(end(&gpu).err(), Some(401), "nothing is recorded");
    assert_eq!(gpu.read::<u32>(at, 4), [0; 4]);
}

#[test]
fn no_recording_allows_to_wait_for_the_context() {
    let gpu = Gpu::open();
    begin(&gpu, Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
    // SAFETY: nothing to prove.
    assert_eq!(code(unsafe { sys::cuCtxSynchronize() }), Err(900));
    assert_eq!(end(&gpu).err(), Some(901));
}

#[test]
fn a_relaxed_recording_allows_allocations() {
    let gpu = Gpu::open();
    begin(&gpu, Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
    let at = gpu.alloc(16).unwrap();
    // SAFETY: the graph is not used any more.
    ok(unsafe { sys::cuGraphDestroy(end(&gpu).unwrap()) });
    gpu.free(at).unwrap();
}

#[test]
fn pinned_memory_is_read_when_the_graph_runs() {
    let gpu = Gpu::open();
    let (at, mut pinned) = (gpu.upload(&[0u32; 1]), std::ptr::null_mut());
    gpu.synchronize().unwrap();
    let mut executable = std::ptr::null_mut();
    // SAFETY: the pinned memory holds one word and is freed when nothing uses it.
    unsafe {
        ok(sys::cuMemHostAlloc(&mut pinned, 4, 0));
        begin(&gpu, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        ok(sys::cuMemcpyHtoDAsync_v2(at, pinned, 4, gpu.stream));
        let graph = end(&gpu).unwrap();
        ok(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        for value in [5u32, 6] {
            pinned.cast::<u32>().write(value);
            ok(sys::cuGraphLaunch(executable, gpu.stream));
            assert_eq!(gpu.read::<u32>(at, 1), [value]);
        }
        ok(sys::cuGraphExecDestroy(executable));
        ok(sys::cuGraphDestroy(graph));
        ok(sys::cuMemFreeHost(pinned));
    }
}
