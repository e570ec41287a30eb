//! Compiles the simulated driver and the kernels into shared libraries in OUT_DIR.
//!
//! The table of kernels is made from the preprocessed sources, so a kernel needs no registration.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel as the sources declare it; `bounds` is what `__launch_bounds__` has in its parentheses.
struct Kernel {
    name: String,
    bounds: String,
}

fn main() {
    let here = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("set by cargo"));
    let kernels = here.join("../kernels");
    let (driver, tests) = (here.join("driver"), here.join("tests/driver/kernels.cu"));
    for path in [&kernels, &driver, &tests] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-env-changed=CXX");

    let mut sources = String::new();
    for path in [kernels.join("apollod.cu"), tests].iter().filter(|path| path.exists()) {
        writeln!(sources, "#include \"{}\"", path.display()).expect("a string takes it");
    }
    let include = [format!("-I{}", kernels.display()), format!("-I{}", driver.display())];
    let table = out.join("kernels.cpp");
    std::fs::write(&table, &sources).expect("OUT_DIR is writable");
    let text = compiler(&["-E", "-P", "-DHOST_LISTS_KERNELS"], &include, &[&table]);
    write_table(&table, sources, &find_kernels(&text));

    let object = out.join("kernels.o");
    let flags = kernel_flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["-c", "-o", path(&object)]).collect();
    compiler(&flags, &include, &[&table]);
    let files = ["state.cpp", "device.cpp", "memory.cpp", "stream.cpp", "module.cpp"].map(|file| driver.join(file));
    let files: Vec<&Path> = files.iter().chain([&object]).map(PathBuf::as_path).collect();
    link(&out.join("libcuda.so"), "libcuda.so", &include, &files);
    let include = [format!("-I{}", kernels.join("host").display())];
    let blas = [driver.join("blas.cpp"), out.join("libcuda.so")];
    link(&out.join("libcublasLt.so.13"), "libcublasLt.so.13", &include, &blas.each_ref().map(PathBuf::as_path));
    // Programs without cudarc look for this name.
    let alias = out.join("libcuda.so.1");
    let _ = std::fs::remove_file(&alias);
    std::os::unix::fs::symlink("libcuda.so", &alias).expect("OUT_DIR is writable");
}

fn path(path: &Path) -> &str {
    path.to_str().expect("paths are UTF-8")
}

/// Runs the C++ compiler and gives back its standard output.
fn compiler(flags: &[&str], include: &[String], files: &[&Path]) -> String {
    let program = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&program);
    command.args(["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]);
    command.args(flags).args(include).args(files);
    let run = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(run.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).expect("sources are UTF-8")
}

/// What the kernels are compiled with. Nothing is fused that the source does not fuse, and a misaligned access, an
/// index outside an array of known size, or a shift by too much is a fault, as on a GPU or worse.
fn kernel_flags() -> Vec<String> {
    let mut flags = vec![
        "-O2".to_string(),
        "-ffp-contract=off".into(),
        "-fno-gnu-unique".into(),
        "-fsanitize=alignment,bounds-strict,shift,integer-divide-by-zero".into(),
        "-fsanitize-undefined-trap-on-error".into(),
    ];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        flags.extend(["-mavx2".into(), "-mfma".into()]);
    }
    flags
}

fn link(to: &Path, name: &str, include: &[String], files: &[&Path]) {
    let soname = format!("-Wl,-soname,{name}");
    compiler(&["-O2", "-shared", "-pthread", "-Wl,--no-undefined", &soname, "-o", path(to)], include, files);
}

/// Every `extern "C" __global__ void name(` with its launch bounds, before or after `void`.
fn find_kernels(text: &str) -> Vec<Kernel> {
    let mut found = Vec::new();
    for (at, word) in text.match_indices("__global__") {
        if !text[..at].trim_end().ends_with("extern \"C\"") {
            continue;
        }
        let mut kernel = Kernel { name: String::new(), bounds: String::new() };
        let mut rest = text[at + word.len()..].trim_start();
        loop {
            if let Some(after) = rest.strip_prefix("__launch_bounds__") {
                (kernel.bounds, rest) = in_parentheses(after);
            } else if let Some(after) = rest.strip_prefix("void ") {
                rest = after.trim_start();
            } else {
                break;
            }
        }
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(0);
        assert!(end > 0, "a kernel without a name: {}", &text[at..text.len().min(at + 80)]);
        kernel.name = rest[..end].to_string();
        found.push(kernel);
    }
    assert!(!found.is_empty(), "no kernels found");
    found
}

/// What the parentheses at the start of `text` hold, and the text after them.
fn in_parentheses(text: &str) -> (String, &str) {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 && c == ')' {
            let open = text.find('(').expect("the depth was above zero");
            return (text[open + 1..i].to_string(), text[i + 1..].trim_start());
        }
    }
    panic!("unbalanced parentheses: {}", &text[..text.len().min(80)]);
}

fn write_table(to: &Path, mut source: String, kernels: &[Kernel]) {
    source.push_str("#include \"kernels.inc\"\nnamespace {\nconst HostKernel HOST_KERNELS[] = {\n");
    for Kernel { name, bounds } in kernels {
        writeln!(source, "    entry<&{name}>(\"{name}\", launch_bounds({bounds})),").expect("a string takes it");
    }
    source.push_str(
        "};\nconst size_t HOST_KERNELS_COUNT = sizeof(HOST_KERNELS) / sizeof(HostKernel);\n}  // namespace\n",
    );
    std::fs::write(to, source).expect("OUT_DIR is writable");
}
