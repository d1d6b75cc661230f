"""Draws the lines of tools/measure_paging as an SVG: decode and prefill speed over the budget of memory.

    tools/measure_paging MODEL.gguf 4 8 12 16 20 | tee lines.txt
    python3 tools/plot_paging.py lines.txt docs/larger-than-memory.svg
"""

import re
import sys

WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 760, 300, 56, 40, 300, 200
COLORS = {"octet": "#d9480f", "llama.cpp": "#1c7ed6"}

points = {}  # (what, who) -> [(GB, tok/s)]
for line in open(sys.argv[1]):
    head = re.match(r"(octet|llama\.cpp) ([\d.]+) GB: ", line)
    if head:
        for what, speed in re.findall(r"(prefill|decode) ([\d.]+) tok/s", line):
            points.setdefault((what, head[1]), []).append((float(head[2]), float(speed)))

out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
]
for column, what in enumerate(["decode", "prefill"]):
    left = LEFT + column * (PLOT_W + 76)
    mine = {who: sorted(p) for (w, who), p in points.items() if w == what}
    most_gb = max(gb for p in mine.values() for gb, _ in p) * 1.05
    most = max(speed for p in mine.values() for _, speed in p) * 1.15
    x = lambda gb: left + PLOT_W * gb / most_gb
    y = lambda speed: TOP + PLOT_H * (1 - speed / most)
    out.append(f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{what}, tok/s</text>')
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if most / s <= 6)
    for i in range(int(most / step) + 1):
        at = y(i * step)
        out.append(f'<line x1="{left}" x2="{left + PLOT_W}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dee2e6"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for gb in sorted({gb for p in mine.values() for gb, _ in p}):
        out.append(f'<text x="{x(gb):.1f}" y="{TOP + PLOT_H + 18}" text-anchor="middle">{gb:g}</text>')
    out.append(f'<text x="{left + PLOT_W / 2}" y="{TOP + PLOT_H + 36}" text-anchor="middle">GB of memory</text>')
    for who, p in mine.items():
        path = " ".join(f"{x(gb):.1f},{y(speed):.1f}" for gb, speed in p)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[who]}" stroke-width="2"/>')
        out += [f'<circle cx="{x(gb):.1f}" cy="{y(s):.1f}" r="3.5" fill="{COLORS[who]}"/>' for gb, s in p]
        gb, speed = p[-1]
        out.append(f'<text x="{x(gb):.1f}" y="{y(speed) - 8:.1f}" text-anchor="end" fill="{COLORS[who]}">{who}</text>')
out.append("</svg>")
open(sys.argv[2], "w").write("\n".join(out) + "\n")
