"""The tests of the Rust crates that use a GPU, on its real driver."""
import json
import os
import re
import subprocess
import sys

from report import CANNOT_RUN, FAIL, PASS, Report, options, say


def run(report, test, name):
    """(status, detail) of one test program."""
    env = dict(os.environ, CARGO_MANIFEST_DIR=str(report.options.build / test["crate"]))
    if report.options.device == "cuda":
        env["APOLLOD_TEST_DRIVER"] = "real"
    log = report.options.work / f"{name}.log"
    with log.open("w") as out:
        try:
            code = subprocess.run([report.options.build / test["file"]], cwd=env["CARGO_MANIFEST_DIR"], env=env, stdout=out,
                                  stderr=subprocess.STDOUT, timeout=max(1, report.left() - 2)).returncode
        except subprocess.TimeoutExpired:
            code = "the end of its time"
    text = log.read_text(errors="replace")
    print(text, flush=True)
    outcome = dict(re.findall(r"^test (\S+) .*?\.\.\. (?:.*\n)*?.*?\b(ok|FAILED|ignored)\b", text, re.MULTILINE))
    passed, failed = (sorted(n for n, o in outcome.items() if o == what) for what in ("ok", "FAILED"))
    on_gpu = [n for n in passed if "cuda" in f"{test['name']}::{n}"]
    if code != 0:
        return FAIL, f"status {code}; failed: {', '.join(failed) or 'none by name, see the log'}; {len(passed)} passed"
    if not on_gpu:
        return CANNOT_RUN, f"none of its {len(passed)} tests names CUDA"
    return PASS, f"{len(passed)} passed, {len(on_gpu)} of them named for CUDA"


def main():
    chosen = options(__doc__)
    build = json.loads((chosen.build / "build.json").read_text())
    tests = {f"{t['crate']} {t['name']}": t for t in build["tests"]}
    without = [crate for crate in build["crates"] if crate not in {t["crate"] for t in build["tests"]}]
    report = Report(chosen, [*tests, *without])
    for name, test in tests.items():
        report.check(name, lambda: run(report, test, name.replace(" ", "-")))
    for crate in without:
        report.check(crate, lambda: (CANNOT_RUN, "the build has no test of it that names CUDA"))


if __name__ == "__main__":
    sys.exit(main())
