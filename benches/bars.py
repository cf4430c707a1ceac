"""Times as bars, in an SVG."""

from __future__ import annotations

from collections.abc import Mapping

COLOURS = ("#2a7", "#999", "#bbb", "#ddd")


def svg(title: str, about: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """For each group, by its label, a bar for each subject: microseconds. The longest of a group is as wide as that of any other."""
    lines, y = [], 60
    for label, figures in groups.items():
        top = max(figures.values())
        lines.append(f'<text x="8" y="{y + 16}">{label}</text>')
        for i, (name, micros) in enumerate(figures.items()):
            width = 420 * micros / top
            colour = COLOURS[min(i, len(COLOURS) - 1)]
            lines.append(f'<rect x="230" y="{y + 14 * i}" width="{width:.1f}" height="11" fill="{colour}"/>')
            lines.append(f'<text x="{236 + width:.1f}" y="{y + 10 + 14 * i}">{micros:.4g} us, {name}</text>')
        y += 10 + 14 * max(len(figures), 2)
    size = f'width="{max(940, 16 + 6 * len(about))}" height="{y + 8}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    head.append('<rect width="100%" height="100%" fill="white"/>')
    head.append(f'<text x="8" y="22" font-size="15">{title}</text>')
    head.append(f'<text x="8" y="42" fill="#555">{about}</text>')
    return "\n".join([*head, *lines, "</svg>", ""])
