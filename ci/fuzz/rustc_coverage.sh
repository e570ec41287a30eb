#!/bin/sh
# Cargo's RUSTC_WORKSPACE_WRAPPER: rustc with the coverage that libFuzzer reads, for this workspace's crates alone. These
# are cargo-fuzz's flags, and all of them are stable; what needs a nightly there is AddressSanitizer.
rustc=$1
shift
case " $* " in
*" --crate-name build_script_build "*) exec "$rustc" "$@" ;;
esac
exec "$rustc" "$@" -C codegen-units=1 -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
  -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
  -C llvm-args=-sanitizer-coverage-trace-compares
