#!/usr/bin/env python3
"""results.json -> modes.svg: tokens per second and inter-token latency in each mode. Standard library only."""
import json
import pathlib

here = pathlib.Path(__file__).parent
modes = json.loads((here / "results.json").read_text())["update_modes"]
rows = [("tokens per second", "#4477aa", lambda m: m["tokens_per_s"]), ("median latency, ms", "#66ccee", lambda m: m["itl_ms"]["median"]),
        ("p99 latency, ms", "#ccbb44", lambda m: m["itl_ms"]["p99"])]
svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 190" font-family="sans-serif" font-size="13"><rect width="900" height="190" fill="#fff"/>']
for column, (title, colour, value) in enumerate(rows):
    x = 110 + 265 * column
    scale = 170 / max(value(m) for m in modes.values())
    svg.append(f'<text x="{x}" y="22" font-weight="bold">{title}</text>')
    for i, (name, mode) in enumerate(modes.items()):
        y = 36 + 36 * i
        if column == 0:
            svg.append(f'<text x="{x - 8}" y="{y + 18}" text-anchor="end">{name}</text>')
        width = value(mode) * scale
        svg.append(f'<rect x="{x}" y="{y}" width="{width:.1f}" height="26" fill="{colour}"/><text x="{x + width + 5:.1f}" y="{y + 18}">{value(mode):.0f}</text>')
svg.append("</svg>")
(here / "modes.svg").write_text("\n".join(svg) + "\n")
