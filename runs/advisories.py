"""pip-audit without a network: its OSV service, answered on loopback from a checkout of an advisory database.

    python runs/advisories.py CHECKOUT [--audit pip-audit] [--out results/reliability/advisories.json]

CHECKOUT: of github.com/pypa/advisory-database, YAML files in the OSV format below `vulns`. Exits with pip-audit's code: 1 if it
knows of anything about a pinned version.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from advdmd.files import write_text

PINS = Path(__file__).parent.parent / "constraints.txt"


def read(checkout: Path) -> dict[str, list[dict[str, Any]]]:
    """Advisories by the package that they are about."""
    found = defaultdict(list)
    for file in sorted((checkout / "vulns").rglob("*.yaml")):
        advisory = yaml.load(file.read_text(), Loader=yaml.BaseLoader)  # text alone: dates and versions stay what they say
        for name in {canonicalize_name(a["package"]["name"]) for a in advisory.get("affected", ())}:
            found[name].append(advisory)
    return found


def affects(advisory: dict[str, Any], name: str, version: str) -> bool:
    """Whether a version is listed, or lies in a range of versions (OSV's evaluation algorithm)."""
    for part in advisory["affected"]:
        if canonicalize_name(part["package"]["name"]) != name:
            continue
        if version in part.get("versions", ()):
            return True
        for span in part.get("ranges", ()):
            if span["type"] == "ECOSYSTEM" and within(span["events"], Version(version)):
                return True
    return False


def within(events: list[dict[str, str]], version: Version) -> bool:
    hit = False
    order = sorted(((k, Version(v)) for e in events for k, v in e.items()), key=lambda kv: kv[1])
    for kind, at in order:
        if kind == "introduced" and version >= at:
            hit = True
        elif (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
            hit = False
    return hit


def serve(known: dict[str, list[dict[str, Any]]]) -> ThreadingHTTPServer:
    """An OSV API with the one call that pip-audit makes, on a free port of this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = canonicalize_name(asked["package"]["name"])
            args = [a for a in known.get(name, ()) if affects(a, name, asked["version"])]
            body = json.dumps({"vulns": args} if args else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("checkout", type=Path)
    ask.add_argument("--audit", default="pip-audit")
    ask.add_argument("--pins", type=Path, default=PINS)
    ask.add_argument("--out", type=Path)
    args = ask.parse_args()
    known = read(args.checkout)
    every = {a["id"]: a for found in known.values() for a in found}
    pins = [line for line in args.pins.read_text().splitlines() if "==" in line]
    about = [p for p in pins if canonicalize_name(p.partition("==")[0]) in known]
    server = serve(known)
    url = f"http://127.0.0.1:{server.server_port}/v1/query"
    words = ["-s", "osv", "--osv-url", url, "-r", str(args.pins), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([args.audit, *words], capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    answer = json.loads(done.stdout)["dependencies"]
    found = {
        "pins": len(pins),
        "answered": sum("vulns" in d for d in answer),
        "advisories": len(every),
        "newest": max(a.get("published", "") for a in every.values())[:10],
        "packages_with_advisories": len(about),
        "vulnerable": {d["name"]: [v["id"] for v in d["vulns"]] for d in answer if d.get("vulns")},
    }
    print(json.dumps(found, indent=1))
    if args.out:
        write_text(args.out, json.dumps(found, indent=1))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
