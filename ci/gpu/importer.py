"""What an importer of CUDA memory sees when the exporter ends: research/2026-11-21-cuda-ipc/exporter_exit.py."""
import json
import sys

from report import MEASURED, ROOT, Broken, Report, options, output_of

SCRIPT = ROOT / "research" / "2026-11-21-cuda-ipc" / "exporter_exit.py"


def sentence(seen):
    """One line of what matters most."""
    after = [c for c in seen["changes"] if c["ms"] >= 0 and c["call"] in ("fill", "read", "synchronize", "word at the end")]
    calls = "; ".join(f"{c['call']} {c['result']} after {c['ms']:.0f} ms" for c in after) or "every call went on as before"
    free = seen["free_bytes"]
    return (f"{calls}; {seen['writes_not_read_back']} of {seen['rounds']} writes not read back; opened later: "
            f"{seen['handle_opened_later']}; free MB {free['before'] >> 20} before, "
            f"{free['exporter_gone_importer_open'] >> 20} held, {free['importer_closed'] >> 20} closed, {free['everything_ended'] >> 20} at the end")


def main():
    chosen = options(__doc__)
    ways = ("exits", "is killed", "frees it")
    report = Report(chosen, [f"the exporter {way}" for way in ways])
    findings = chosen.work / "exporter_exit.json"

    def look():
        if chosen.device == "cpu":
            raise Broken("there is no CUDA memory")
        size = [] if chosen.device == "cuda" else ["--bytes", 1 << 20]
        output_of([sys.executable, SCRIPT, "--json", findings, *size], max(1, report.left() - 2))
        report.keep("findings", json.loads(findings.read_text()))
        return MEASURED, sentence(report.data["findings"]["ways"][ways[0]])
    report.check(f"the exporter {ways[0]}", look)
    for way in ways[1:]:
        def another():
            if way not in report.data.get("findings", {}).get("ways", {}):
                raise Broken("it was not found out")
            return MEASURED, sentence(report.data["findings"]["ways"][way])
        report.check(f"the exporter {way}", another)


if __name__ == "__main__":
    sys.exit(main())
