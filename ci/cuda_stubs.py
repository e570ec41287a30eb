#!/usr/bin/env python3
"""Make stand-in CUDA libraries, a few 100 KB in all, beside PyPI's torch.

usage: cuda_stubs.py TORCH_LIB_DIR      needs gcc, nm and readelf (binutils)

PyPI's torch for Linux is linked against some 2 GB of CUDA libraries and does not import without them, even where it
only ever computes on the CPU. This reads which libraries torch's own files need and do not bring, which symbols (and
symbol versions) they expect there, and builds for each a shared object of that soname in which every function answers
100 ("no CUDA-capable device") or, where a string is expected, a string. torch then finds no GPU and uses the CPU.
Running it again finds the libraries already there and makes nothing.
"""
import collections
import pathlib
import re
import subprocess
import sys
import tempfile

# Libraries that every machine with torch's own requirements has. libcuda is the driver: torch loads it on demand.
SYSTEM = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-x86-64|libgomp|libnuma|libz|libcuda)(-x86-64)?\.so"
)
SYSTEM_FILES = (
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0",
    "ld-linux-x86-64.so.2",
)
# Which library an unversioned symbol belongs to, by the start of its name; the first match wins.
PREFIXES = (
    ("cuda", "cudart"), ("__cuda", "cudart"), ("cublasLt", "cublasLt"), ("cublas", "cublas"),
    ("cusparseLt", "cusparseLt"), ("cusparse", "cusparse"), ("cusolver", "cusolver"), ("cufft", "cufft"),
    ("cuFile", "cufile"), ("curand", "curand"), ("cudnn", "cudnn"), ("nvrtc", "nvrtc"), ("nccl", "nccl"),
    ("nvshmem", "nvshmem"), ("cupti", "cupti"),
)


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Needs:
    """What the shared objects of one folder expect from libraries that are not in it."""

    def __init__(self, folder):
        self.libraries = set()        # sonames that are missing
        self.undefined = {}           # symbol -> version ("" if none)
        self.defined = set()          # symbols that the folder or the system provides
        self.version_library = {}     # symbol version -> missing soname that defines it
        present = {f.name for f in folder.iterdir() if ".so" in f.name}
        for name in sorted(present):
            self._read(folder / name, present)
        for name in SYSTEM_FILES:
            path = output_of("gcc", "-print-file-name=" + name).strip()
            for line in output_of("nm", "-D", path).splitlines():
                self.defined.add(line.split()[-1].partition("@")[0])

    def _read(self, path, present):
        for match in re.finditer(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", path)):
            if match[1] not in present and not SYSTEM.match(match[1]):
                self.libraries.add(match[1])
        for line in output_of("nm", "-D", path).splitlines():
            kind, symbol = line.split()[-2:]
            name, _, version = symbol.partition("@")
            if kind == "U":
                self.undefined[name] = version.lstrip("@")
            elif kind not in "wv":    # weak and undefined: absent is allowed
                self.defined.add(name)
        library = None
        for line in output_of("readelf", "-V", "-W", path).splitlines():
            if match := re.search(r"File: (\S+)", line):
                library = match[1]
            if (match := re.search(r"Name: (\S+)\s+Flags", line)) and library in self.libraries:
                self.version_library.setdefault(match[1], library)

    def by_library(self):
        """soname -> {symbol: version}, one entry for every missing library."""
        result = {library: {} for library in sorted(self.libraries)}
        for symbol, version in self.undefined.items():
            if symbol not in self.defined:
                library = self.version_library.get(version) or self._by_prefix(symbol)
                if library:
                    result[library][symbol] = version
        return result

    def _by_prefix(self, symbol):
        for prefix, stem in PREFIXES:
            if symbol.startswith(prefix):
                found = sorted(n for n in self.libraries if re.match(rf"lib{stem}[._]", n))
                return found[0] if found else None
        return next((n for n in sorted(self.libraries) if n.startswith("libcudart.")), None)


def build(path, symbols):
    """Compile one stand-in library at `path` that defines `symbols` ({name: version})."""
    versions = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        source, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "versions")
        with source.open("w") as c:
            for symbol, version in sorted(symbols.items()):
                versions[version].append(symbol)
                answer = '(long)"stub"' if "String" in symbol or "ErrorName" in symbol else "100"
                c.write(f"long {symbol}(void) {{ return {answer}; }}\n")
        script.write_text("".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items() if v))
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", source, "-o", path, f"-Wl,-soname,{path.name}"]
        if any(versions):
            command.append(f"-Wl,--version-script,{script}")
        subprocess.run(command, check=True)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    for library, symbols in Needs(folder).by_library().items():
        build(folder / library, symbols)
        print(f"{library}: {len(symbols)} symbols, {(folder / library).stat().st_size} bytes")


if __name__ == "__main__":
    main()
