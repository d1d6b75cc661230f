"""Draws the speeds of docs/performance.md under the roofs that the machine sets: what memory gives, what int8 arithmetic gives.

    python3 tools/plot_roofline.py docs/performance.md docs/pictures/roofline.svg

Read from the page: the rows of its table for the 4-layer model with AVX-512 (`| Q4_0 | prefill 512 | 223 tok/s | …`), and of its section
Roofline the two limits (`| memory | 28 GB/s |`, `| int8 | 600 GMAC/s |`).
"""

import math
import re
import sys

# Mixtral 8x7B's matrices, in weights: attention of a layer, one expert, the head. The file has 4 layers of 8 experts.
ATTENTION, EXPERT, HEAD, LAYERS, EXPERTS = 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336, 4096 * 32000, 4, 8
BITS = {"Q4_0": 4.5, "Q4_K": 4.5, "Q4_K_M": 4.85, "Q6_K": 6.5625, "Q8_0": 8.5}
COLORS = {"Q4_0": "#d9480f", "Q4_K": "#1c7ed6", "Q4_K_M": "#f08c00", "Q6_K": "#2f9e44", "Q8_0": "#9c36b5"}

WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 720, 410, 62, 34, 560, 310
X, Y = (0.5, 400), (10, 1000)


def work(what):
    """Tokens of a pass, its products and the weights that it reads."""
    tokens = int(what.split()[1]) if what.startswith("prefill") else 1
    # Of a layer's experts, those that at least one token chooses, if all are as likely.
    touched = EXPERTS * (1 - (1 - 2 / EXPERTS) ** tokens)
    products = tokens * LAYERS * (ATTENTION + 2 * EXPERT) + HEAD
    return tokens, products, LAYERS * (ATTENTION + touched * EXPERT) + HEAD


page = open(sys.argv[1]).read()
memory = float(re.search(r"\| memory \| ([\d.]+) GB/s", page)[1])
peak = float(re.search(r"\| int8 \| ([\d.]+) GMAC/s", page)[1])
points, name = [], None
for line in page[page.index("| AVX-512 | tokens |") :].split("\n\n")[0].split("\n"):
    row = re.match(r"\| (\w*) ?\| (prefill \d+|decode) \| ([\d.]+) tok/s", line)
    if row:
        name = row[1] or name
        tokens, products, weights = work(row[2])
        # Attention over long contexts is other work.
        if tokens <= 512:
            rate = products * float(row[3]) / tokens / 1e9
            points.append((name, row[2], products / (weights * BITS[name] / 8), rate))

x = lambda v: LEFT + PLOT_W * math.log(v / X[0]) / math.log(X[1] / X[0])
y = lambda v: TOP + PLOT_H * (1 - math.log(v / Y[0]) / math.log(Y[1] / Y[0]))
out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
]
text = lambda at_x, at_y, words, more="": out.append(f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{words}</text>')
for v in (10, 20, 50, 100, 200, 500, 1000):
    out.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e9ecef"/>')
    text(LEFT - 6, y(v) + 4, v, 'text-anchor="end"')
for v in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 400):
    out.append(f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{TOP}" y2="{TOP + PLOT_H}" stroke="#e9ecef"/>')
    text(x(v), TOP + PLOT_H + 18, v, 'text-anchor="middle"')
text(LEFT + PLOT_W / 2, TOP + PLOT_H + 38, "products for each byte of weights that is read", 'text-anchor="middle"')
text(LEFT, TOP - 14, "GMAC/s", 'text-anchor="end"')
ridge = peak / memory
roof = [(X[0], X[0] * memory), (ridge, peak), (X[1], peak)]
path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
out.append(f'<polyline points="{path}" fill="none" stroke="#495057" stroke-width="2"/>')
text(x(X[1]) - 4, y(peak) - 7, f"int8 {peak:g} GMAC/s", 'text-anchor="end" fill="#495057"')
middle = math.sqrt(X[0] * ridge)
slope = -math.degrees(math.atan2(PLOT_H / math.log(Y[1] / Y[0]), PLOT_W / math.log(X[1] / X[0])))
at = f'transform="rotate({slope:.1f} {x(middle):.1f} {y(middle * memory) - 7:.1f})" text-anchor="middle" fill="#495057"'
text(x(middle), y(middle * memory) - 7, f"memory {memory:g} GB/s", at)
for name, what, intensity, rate in points:
    out.append(f'<circle cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="4.5" fill="{COLORS[name]}" fill-opacity="0.85"/>')
# Each pass is named once, below its lowest point.
for what in dict.fromkeys(p[1] for p in points):
    same = [p for p in points if p[1] == what]
    low = min(p[3] for p in same)
    right = max(p[2] for p in same)
    text(x(right), y(low) + 18, what, 'text-anchor="middle"')
for i, name in enumerate(dict.fromkeys(p[0] for p in points)):
    at_x, at_y = LEFT + PLOT_W + 16, TOP + 14 + 20 * i
    out.append(f'<circle cx="{at_x}" cy="{at_y - 4}" r="4.5" fill="{COLORS[name]}"/>')
    text(at_x + 10, at_y, name)
out.append("</svg>")
open(sys.argv[2], "w").write("\n".join(out) + "\n")
for name, what, intensity, rate in points:
    roof = min(peak, intensity * memory)
    print(f"{name} {what}: {intensity:.1f} products a byte, {rate:.0f} GMAC/s, {rate / roof:.0%} of the roof")
