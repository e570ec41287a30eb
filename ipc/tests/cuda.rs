//! Weights in a GPU's memory, opened by another process, on the simulated driver.
//!
//! The test program starts itself as exporter or importer, each with a driver of its own, and one process's device memory
//! is opened by the other through CUDA IPC handles. With APOLLOD_TEST_DRIVER=real it is the machine's GPU, and the tests
//! that need errors on request are left out.

mod common;

use common::processes::{Other, answer, hex, run_tests};
use common::{content, decoder, model};
use cudarc::driver::{result, sys};
use ipc::{Allocation, Attachment, Manifest, ManifestTensor, Memory, Source};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use weight_map::HfTensor;

const NAME: &str = "model.layers.0.self_attn.q_proj.weight";
/// What torch's allocator takes from the driver at least, and in multiples of.
const SEGMENT: usize = 2 << 20;

const TESTS: [(&str, fn()); 8] = [
    ("bytes_written_through_cuda_ipc_are_seen_by_the_exporter", bytes_are_shared),
    ("a_detached_process_has_nothing_open_and_the_memory_stays_the_exporters", detached),
    ("a_device_that_is_not_here_is_told_with_those_that_are", other_device),
    ("a_killed_exporter_is_noticed_and_a_killed_importer_harms_nobody", killed),
    ("a_handle_of_nothing_is_refused_by_the_drivers_name", bad_handle),
    ("memory_that_is_not_what_the_manifest_says_is_refused", wrong_memory),
    ("every_failing_call_is_named_and_leaves_nothing_open", failing_calls),
    ("a_machine_without_a_driver_says_so", no_driver),
];
/// The first so many are for a real driver too.
const REAL: usize = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["export", model, socket] => export(Path::new(model), Path::new(socket)),
        ["import-by-socket", socket] => import(&Source::Socket(socket.into()), true),
        ["import", manifest] => import(&Source::Manifest(manifest.into()), true),
        ["import-without-driver", manifest] => import(&Source::Manifest(manifest.into()), false),
        rest if simulated_driver::real() => return run_tests(rest, &TESTS[..REAL]),
        rest => return run_tests(rest, &TESTS),
    }
    ExitCode::SUCCESS
}

/// The exporter's device memory: small tensors share an allocation, the embedding has one of its own.
struct Exported {
    allocations: Vec<(u64, u64)>,
    tensors: Vec<ManifestTensor>,
}

impl Exported {
    fn new(expected: &[HfTensor]) -> Exported {
        let mut exported = Exported { allocations: Vec::new(), tensors: Vec::new() };
        let (first, rest) = expected.split_at(1);
        for part in [first, rest] {
            let mut bytes = Vec::new();
            for tensor in part {
                exported.tensors.push(ManifestTensor {
                    name: tensor.name.clone(),
                    dtype: "bfloat16".into(),
                    shape: tensor.shape.clone(),
                    strides: if tensor.shape.len() == 2 { vec![tensor.shape[1], 1] } else { vec![1] },
                    allocation: exported.allocations.len(),
                    offset: bytes.len() as u64,
                });
                bytes.extend(content(&tensor.name, tensor.shape.iter().product::<usize>() * 2));
                // As torch's allocator does: 512 bytes apart.
                bytes.resize(bytes.len().next_multiple_of(512), 0);
            }
            bytes.resize(bytes.len().next_multiple_of(SEGMENT), 0);
            // SAFETY: the context is current; the memory is filled before anybody reads it.
            let base = unsafe { result::malloc_sync(bytes.len()) }.unwrap();
            // SAFETY: as many bytes as were allocated.
            unsafe { result::memcpy_htod_sync(base, &bytes) }.unwrap();
            // The copy may still be under way.
            result::ctx::synchronize().unwrap();
            exported.allocations.push((base, bytes.len() as u64));
        }
        exported
    }

    fn manifest(&self, model: &Path) -> Manifest {
        let allocation = |&(base, bytes): &(u64, u64)| {
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            // SAFETY: handle may be filled; base is an allocation of ours.
            unsafe { sys::cuIpcGetMemHandle(&raw mut handle, base) }.result().unwrap();
            let handle = hex(&handle.reserved.map(|byte| byte as u8));
            Allocation::CudaIpc { handle, bytes, device: uuid() }
        };
        Manifest {
            version: 1,
            epoch: ipc::random_epoch().unwrap(),
            pid: std::process::id(),
            model_dir: model.canonicalize().unwrap(),
            rank: 0,
            world_size: 1,
            allocations: self.allocations.iter().map(allocation).collect(),
            tensors: self.tensors.clone(),
            packing: Vec::new(),
            server: None,
            controls: Vec::new(),
        }
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let mut bytes = vec![0u8; tensor.shape.iter().product::<usize>() * 2];
        // SAFETY: the tensor lies in this allocation by construction.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.allocations[tensor.allocation].0 + tensor.offset) }.unwrap();
        bytes
    }
}

/// The first device's, as every process of this machine sees it.
fn uuid() -> String {
    simulated_driver::load();
    ipc::CudaDevice::all().unwrap().swap_remove(0).uuid
}

/// What [`open_now`] is to say; only the simulated driver's mappings can be told from others.
fn open(mapped: usize, context: i32) -> String {
    format!("{} open, context {context}", if simulated_driver::real() { 0 } else { mapped })
}

fn enter_context() {
    simulated_driver::load();
    result::init().unwrap();
    // SAFETY: the device is the driver's; the context is kept to the end of the process.
    let context = unsafe { result::primary_ctx::retain(result::device::get(0).unwrap()) }.unwrap();
    // SAFETY: retained above.
    unsafe { result::ctx::set_current(context) }.unwrap();
}

/// Serves its manifest on a socket, one connection after the other, and answers `manifest` and names of tensors.
fn export(model: &Path, socket: &Path) {
    enter_context();
    let exported = Exported::new(&decoder(true).tensors());
    let manifest = serde_json::to_string(&exported.manifest(model)).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    let line = format!("{manifest}\n");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            reader.read_line(&mut String::new()).unwrap();
            reader.get_mut().write_all(line.as_bytes()).unwrap();
            // The lease, until the other end closes it.
            while reader.read_line(&mut String::new()).is_ok_and(|bytes| bytes > 0) {}
        }
    });
    answer(|question| if question == "manifest" { manifest.clone() } else { hex(&exported.read(question)) });
}

/// Attaches, or says why not and what is left open.
fn import(source: &Source, driver: bool) {
    if driver {
        simulated_driver::load();
    }
    let mut attachment = match Attachment::open(source, &decoder(true).tensors()) {
        Ok(attachment) => Some(attachment),
        Err(error) => {
            println!("{error} | {}", open_now(driver));
            return;
        }
    };
    answer(|question| match (question.parse::<u8>(), &attachment) {
        (Ok(value), Some(attachment)) => {
            attachment.check().unwrap();
            write(attachment, NAME, 2, &[value, value]);
            "written".into()
        }
        (Err(_), _) if question == "detach" => {
            attachment = None;
            open_now(true)
        }
        (Err(_), _) if question == "open" => open_now(true),
        (Err(_), Some(attachment)) => hex(&read(attachment, question)),
        _ => "nothing is attached".into(),
    });
}

/// Mappings of device memory that are open in this process, and how often the primary context is held.
fn open_now(driver: bool) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().filter(|line| line.contains("simulated_cuda_")).count();
    let (mut flags, mut active) = (0, 0);
    if driver {
        // SAFETY: both may be written; a driver that is not initialized says so and writes nothing.
        let _ = unsafe { sys::cuDevicePrimaryCtxGetState(0, &raw mut flags, &raw mut active) };
    }
    format!("{mapped} open, context {active}")
}

fn device_address(attachment: &Attachment, name: &str) -> (u64, usize) {
    let tensor = attachment.find(name).unwrap();
    match tensor.memory {
        Memory::Cuda(address) => (address, tensor.bytes),
        Memory::Host(_) => panic!("{name} lies in the machine's memory"),
    }
}

/// Runs something in the device's context, as a backend would.
fn in_context<T>(work: impl FnOnce() -> T) -> T {
    let device = result::device::get(0).unwrap();
    // SAFETY: released below.
    let context = unsafe { result::primary_ctx::retain(device) }.unwrap();
    // SAFETY: retained above.
    unsafe { result::ctx::set_current(context) }.unwrap();
    let done = work();
    // SAFETY: no context is what this thread had before.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    // SAFETY: retained above.
    unsafe { result::primary_ctx::release(device) }.unwrap();
    done
}

fn write(attachment: &Attachment, name: &str, at: usize, bytes: &[u8]) {
    let (address, length) = device_address(attachment, name);
    assert!(at + bytes.len() <= length);
    in_context(|| {
        // SAFETY: inside the tensor, which the attachment keeps open.
        unsafe { result::memcpy_htod_sync(address + at as u64, bytes) }.and_then(|()| result::ctx::synchronize())
    })
    .unwrap();
}

fn read(attachment: &Attachment, name: &str) -> Vec<u8> {
    let (address, length) = device_address(attachment, name);
    let mut bytes = vec![0; length];
    // SAFETY: the whole tensor, which the attachment keeps open.
    in_context(|| unsafe { result::memcpy_dtoh_sync(&mut bytes, address) }).unwrap();
    bytes
}

/// An exporter in a process of its own.
struct Exporter {
    dir: tempfile::TempDir,
    process: Other,
    socket: PathBuf,
}

fn exporter() -> Exporter {
    let (dir, model, _) = model(true);
    let socket = dir.path().join("s");
    let process = Other::start(&[Path::new("export"), &model, &socket]);
    Exporter { dir, process, socket }
}

impl Exporter {
    /// Its manifest, changed, in a file.
    fn manifest(&mut self, change: impl FnOnce(&mut Value)) -> PathBuf {
        let mut manifest: Value = serde_json::from_str(&self.process.ask("manifest")).unwrap();
        change(&mut manifest);
        let path = self.dir.path().join("manifest.json");
        std::fs::write(&path, manifest.to_string()).unwrap();
        path
    }

    /// Why an importer refuses the changed manifest; nothing may be left open.
    fn refusal(&mut self, change: impl FnOnce(&mut Value)) -> String {
        let path = self.manifest(change);
        let (_importer, said) = Other::start_with(&[Path::new("import"), &path], &[]);
        let (error, open) = said.rsplit_once(" | ").unwrap_or_else(|| panic!("not refused: {said}"));
        assert_eq!(open, "0 open, context 0", "{error}");
        error.to_owned()
    }
}

fn bytes_are_shared() {
    let mut exporter = exporter();
    let mut importer = Other::start(&[Path::new("import-by-socket"), &exporter.socket]);
    for tensor in decoder(true).tensors() {
        let want = content(&tensor.name, tensor.shape.iter().product::<usize>() * 2);
        assert_eq!(importer.ask(&tensor.name), hex(&want), "{}", tensor.name);
    }
    let mut want = content(NAME, 128);
    assert_eq!(importer.ask("171"), "written");
    want[2..4].fill(171);
    assert_eq!(exporter.process.ask(NAME), hex(&want));
    assert_eq!(importer.ask("open"), open(2, 1));
}

fn detached() {
    let mut exporter = exporter();
    let mut importer = Other::start(&[Path::new("import-by-socket"), &exporter.socket]);
    assert_eq!(importer.ask("detach"), "0 open, context 0");
    assert_eq!(exporter.process.ask(NAME), hex(&content(NAME, 128)), "the memory was never the importer's");

    // In this process, for what only a value shows.
    simulated_driver::load();
    let attachment = Attachment::open(&Source::Socket(exporter.socket.clone()), &decoder(true).tensors()).unwrap();
    let device = attachment.device().expect("the weights are on a device");
    assert_eq!((&device.uuid, device.ordinal), (&uuid(), 0));
    assert!(simulated_driver::real() || device.to_string().contains("simulated GPU"), "{device}");
    assert_eq!(ipc::CudaDevice::all().unwrap()[..1], std::slice::from_ref(device)[..]);
    let tensor = attachment.find(NAME).unwrap();
    for reads_on_the_host in [true, false] {
        let touched = std::panic::catch_unwind(|| match reads_on_the_host {
            true => drop(tensor.read()),
            false => tensor.write(0, &[1, 2]),
        });
        assert!(touched.is_err(), "device memory was touched as if it were the host's");
    }
    drop(attachment);
    assert_eq!(open_now(true), "0 open, context 0");
    // It gave the lease back, last.
    Attachment::open(&Source::Socket(exporter.socket.clone()), &decoder(true).tensors()).unwrap();
}

fn other_device() {
    let mut exporter = exporter();
    let other = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f";
    let set = |uuid: &str| {
        let uuid = uuid.to_owned();
        move |manifest: &mut Value| {
            manifest["allocations"].as_array_mut().unwrap().iter_mut().for_each(|a| a["device"] = uuid.clone().into());
        }
    };
    let error = exporter.refusal(set(other));
    assert!(error.contains(other) && error.contains(&uuid()) && error.contains("CUDA_VISIBLE_DEVICES"), "{error}");
    // The digits count, in whatever case, and not the word before them.
    for spelled in [uuid().to_uppercase(), uuid().replace("GPU", "MIG")] {
        let path = exporter.manifest(set(&spelled));
        Other::start(&[Path::new("import"), &path]);
    }
}

fn bad_handle() {
    let error = exporter().refusal(|m| m["allocations"][1]["handle"] = "00".repeat(64).into());
    assert!(error.contains("CUDA_ERROR_INVALID_VALUE (1) in cuIpcOpenMemHandle(allocation 1)"), "{error}");
    assert!(error.contains("start it again") && error.contains("--ipc=host"), "{error}");
}

fn wrong_memory() {
    let mut exporter = exporter();
    let error = exporter.refusal(|m| m["allocations"][1]["bytes"] = (SEGMENT + 1).into());
    assert!(error.starts_with("allocation 1: ") && error.contains("but the server describes 2097153"), "{error}");

    let twice = |m: &mut Value, again: String| {
        let mut copy = m["allocations"][0].clone();
        copy["handle"] = again.into();
        m["allocations"].as_array_mut().unwrap().push(copy);
    };
    let error = exporter.refusal(|m| {
        let handle = m["allocations"][0]["handle"].as_str().unwrap().to_uppercase();
        twice(m, handle);
    });
    assert!(error.contains("is listed twice"), "{error}");
    // Other bytes where the handle has some to spare: the same memory.
    let error = exporter.refusal(|m| {
        let handle = format!("{}ff", &m["allocations"][0]["handle"].as_str().unwrap()[..126]);
        twice(m, handle);
    });
    assert!(error.contains("allocation 2: it is the memory of allocation 0 under another handle"), "{error}");

    let error = exporter.refusal(|m| m["tensors"][3]["offset"] = SEGMENT.into());
    assert!(error.contains("does not lie in allocation 1"), "{error}");
    assert_eq!(exporter.process.ask(NAME), hex(&content(NAME, 128)));
}

fn killed() {
    let mut exporter = exporter();
    for _ in 0..5 {
        let mut importer = Other::start(&[Path::new("import-by-socket"), &exporter.socket]);
        assert_eq!(importer.ask("9"), "written");
        importer.kill();
    }
    let mut want = content(NAME, 128);
    want[2..4].fill(9);
    assert_eq!(exporter.process.ask(NAME), hex(&want));

    simulated_driver::load();
    let attachment = Attachment::open(&Source::Socket(exporter.socket.clone()), &decoder(true).tensors()).unwrap();
    exporter.process.child.kill().unwrap();
    let killed = Instant::now();
    attachment.watch(Duration::from_secs(10)).unwrap_err();
    let seen = killed.elapsed();
    println!("the end of the exporter was seen after {seen:?}");
    // A GPU's driver has a process to take down before its end can be seen.
    let most = if simulated_driver::real() { Duration::from_secs(5) } else { Duration::from_millis(100) };
    assert!(seen < most, "seen after {seen:?}");
    drop(attachment);
    assert_eq!(open_now(true), "0 open, context 0");
}

fn failing_calls() {
    let mut exporter = exporter();
    let path = exporter.manifest(|_| {});
    // What fails, by name and how often it was called; what is said; what may still be open. What a failing close
    // leaves open, the driver takes back when the process ends.
    let cases = [
        ("cuInit:1=100", "CUDA_ERROR_NO_DEVICE (100) in cuInit: no GPU is visible", "0 open, context 0"),
        ("cuDeviceGetCount:1=999", "CUDA_ERROR_UNKNOWN (999) in cuDeviceGetCount", "0 open, context 0"),
        ("cuDeviceGet:1=101", "in cuDeviceGet(device 0)", "0 open, context 0"),
        ("cuDeviceGetUuid:1=999", "in cuDeviceGetUuid(device 0)", "0 open, context 0"),
        ("cuDeviceGetName:1=999", "in cuDeviceGetName(device 0)", "0 open, context 0"),
        (
            "cuDevicePrimaryCtxRetain:1=2",
            "CUDA_ERROR_OUT_OF_MEMORY (2) in cuDevicePrimaryCtxRetain(device 0): the GPU's",
            "0 open, context 0",
        ),
        ("cuCtxGetCurrent:1=999", "in cuCtxGetCurrent", "0 open, context 0"),
        ("cuCtxSetCurrent:1=999", "in cuCtxSetCurrent", "0 open, context 0"),
        (
            "cuIpcOpenMemHandle:1=201",
            "(201) in cuIpcOpenMemHandle(allocation 0): the handle is of this very",
            "0 open, context 0",
        ),
        (
            "cuIpcOpenMemHandle:2=801",
            "(801) in cuIpcOpenMemHandle(allocation 1): CUDA IPC does not work",
            "0 open, context 0",
        ),
        (
            "cuIpcOpenMemHandle:2=2",
            "(2) in cuIpcOpenMemHandle(allocation 1): the GPU's memory is full",
            "0 open, context 0",
        ),
        ("cuMemGetAddressRange:1=999", "(999) in cuMemGetAddressRange(allocation 0)", "0 open, context 0"),
        ("cuPointerGetAttribute:2=1", "in cuPointerGetAttribute(allocation 1)", "0 open, context 0"),
        (
            "cuPointerGetAttribute:2=1,cuCtxSynchronize:1=999",
            "in cuPointerGetAttribute(allocation 1)",
            "0 open, context 0",
        ),
        (
            "cuPointerGetAttribute:2=1,cuIpcCloseMemHandle:1=999",
            "in cuPointerGetAttribute(allocation 1)",
            "1 open, context 0",
        ),
        // A broken context: nothing can be closed in it, and nobody waits for it.
        (
            "cuMemGetAddressRange:2=700",
            "(700) in cuMemGetAddressRange(allocation 1): something broke",
            "2 open, context 0",
        ),
    ];
    for (fail, words, open) in cases {
        let (_importer, said) = Other::start_with(&[Path::new("import"), &path], &[("SIMULATED_CUDA_FAIL", fail)]);
        let (error, left) = said.rsplit_once(" | ").unwrap_or_else(|| panic!("{fail} did not fail: {said}"));
        assert!(error.starts_with("CUDA error ") && error.contains(words), "{fail}: {error}");
        assert_eq!(left, open, "{fail}: {error}");
    }
    // A driver that does not know how long other processes' memory is.
    let fail = [("SIMULATED_CUDA_FAIL", "cuMemGetAddressRange:1=500,cuMemGetAddressRange:2=1")];
    let (importer, first) = Other::start_with(&[Path::new("import"), &path], &fail);
    assert_eq!(first, "ready");
    drop(importer);
    // A detach that cannot wait or close is told nobody, and does not end the process.
    let fail = [("SIMULATED_CUDA_FAIL", "cuCtxSynchronize:1=999,cuIpcCloseMemHandle:1=999")];
    let (mut importer, first) = Other::start_with(&[Path::new("import"), &path], &fail);
    assert_eq!(first, "ready");
    assert_eq!(importer.ask("detach"), "1 open, context 0");
    assert_eq!(exporter.process.ask(NAME), hex(&content(NAME, 128)));
}

fn no_driver() {
    let mut exporter = exporter();
    let path = exporter.manifest(|_| {});
    let (_importer, said) = Other::start_with(&[Path::new("import-without-driver"), &path], &[]);
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this machine has a driver, which said: {said}");
        return;
    }
    assert!(said.contains("there is no CUDA driver (libcuda.so.1) here"), "{said}");
}
