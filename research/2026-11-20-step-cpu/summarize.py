#!/usr/bin/env python3
"""runs.jsonl -> results.json (medians over the runs) and step.svg (stacked bars by phase). Standard library only."""
import json, pathlib, statistics as st
here = pathlib.Path(__file__).parent
runs = [json.loads(line) for line in (here / 'runs.jsonl').read_text().splitlines()]
PHASES = [('prefill', 'prefill_ms', 'prefill'), ('forward', 'forward_ms', 'fwd'), ('backward', 'backward_ms', 'bwd'), ('update', 'update_ms', 'opt')]
COLOURS = ['#4477aa', '#66ccee', '#228833', '#ccbb44']
ours = {name: st.median(r['apollod'][key] for r in runs) for name, key, _ in PHASES}
peer = {name: st.median(r['peer']['modes']['frozen'][key] for r in runs) for name, _, key in PHASES}
totals = {'apollod': [r['apollod']['total_ms'] for r in runs], 'peer': [r['peer']['modes']['frozen']['total'] for r in runs]}
results = {
    'runs': len(runs), 'apollod_ms': ours, 'peer_ms': peer,
    'total_ms': {k: {'median': st.median(v), 'least': min(v), 'most': max(v)} for k, v in totals.items()},
    'ratio_per_run': [round(p / a, 3) for a, p in zip(totals['apollod'], totals['peer'])],
    'apollod_private_mb': st.median(r['apollod']['private_memory_mb'] for r in runs),
    'peer_rss_above_import_mb': st.median(r['peer']['peak_rss_mb'] - r['peer']['rss_import_mb'] for r in runs),
    'floor_ms': {'prefill': st.median(r['apollod']['floor_prefill_ms'] for r in runs), 'decision': st.median(r['apollod']['floor_decision_ms'] for r in runs)},
}
(here / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
bars = [('PyTorch + apollo-torch', peer), ('apollod', ours), ('floor', {'prefill': results['floor_ms']['prefill'], 'update': results['floor_ms']['decision']})]
scale = 560 / max(sum(b.values()) for _, b in bars)
svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 190" font-family="sans-serif" font-size="13"><rect width="820" height="190" fill="#fff"/>']
for i, (name, values) in enumerate(bars):
    x, y = 160, 20 + 42 * i
    svg.append(f'<text x="150" y="{y + 19}" text-anchor="end">{name}</text>')
    for (phase, *_), colour in zip(PHASES, COLOURS):
        if phase in values:
            width = values[phase] * scale
            svg.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{colour}"/>')
            x += width
    svg.append(f'<text x="{x + 6:.1f}" y="{y + 19}">{sum(values.values()):.0f} ms</text>')
for i, ((phase, *_), colour) in enumerate(zip(PHASES, COLOURS)):
    svg.append(f'<rect x="{160 + 110 * i}" y="158" width="12" height="12" fill="{colour}"/><text x="{178 + 110 * i}" y="168">{phase}</text>')
svg.append('</svg>')
(here / 'step.svg').write_text('\n'.join(svg) + '\n')
