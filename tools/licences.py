#!/usr/bin/env python3
"""Writes docs/licences.md, the licences of all crates in Cargo.lock, as their authors say them."""
import collections
import json
import pathlib
import subprocess

root = pathlib.Path(__file__).resolve().parent.parent
command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
packages = json.loads(subprocess.check_output(command, cwd=root))["packages"]

by_licence = collections.defaultdict(list)
for package in packages:
    if package["name"] == "octet":
        continue
    if not package["license"]:
        raise SystemExit(f"{package['name']} has no licence (expected an SPDX expression)")
    licence = package["license"].replace(" / ", " OR ").replace("/", " OR ")
    by_licence[licence].append(f"{package['name']} {package['version']}")

text = f"""# Licences

octet is under Apache-2.0. It is built from the crates below; those for tests, for other systems and for the feature `cuda` are in
the list, too. Where a line says OR, octet takes the permissive one. This page is made from `Cargo.lock`:

```
tools/licences.py
```

`tests/licences.rs` fails when a crate or a version is missing here, or when a licence is not permissive.

"""
for licence, crates in sorted(by_licence.items(), key=lambda item: (-len(item[1]), item[0])):
    text += f"- **{licence}**: {', '.join(sorted(crates))}\n"
(root / "docs" / "licences.md").write_text(text)
