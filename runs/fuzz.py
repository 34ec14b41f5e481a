"""Hostile input, 20,000 cases: each ends in a result or one clear error, none in a crash, a hang, a file outside of the folder.

    python runs/fuzz.py [--cases 20000] [--seed 0] [--out results/reliability/fuzz.json]

A ValueError, or an OSError that names a file, is a clear error. Anything else is a finding, and so are five seconds.
"""

import argparse
import csv
import functools
import io
import json
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save, save_file

from advdmd.data import embedding_cache
from advdmd.data.captioned_images import ImagePlace, load_image
from advdmd.data.sources import read_captioned_images
from advdmd.distillation import validation
from advdmd.evaluation import dpg, judging, results
from advdmd.mini.suites import item_of
from advdmd.mini.world import caption
from advdmd.models import loading
from advdmd.monitoring import health
from advdmd.recipes import registry
from advdmd.recipes.overrides import dump
from advdmd.training import checkpoint
from advdmd.types import Cond

STRANGE = (
    *(
        "",
        " ",
        "\x00",
        "\n",
        "\t\r",
        "null",
        "nan",
        ".inf",
        "-1",
        "1e999",
        "9" * 400,
        "true",
        "[]",
        "{}",
        "../..",
        "/etc/passwd",
        "~",
    ),
    *(
        "a picture of",
        "red",
        "circle",
        "above",
        "é",
        "ß",
        "日本",
        "🟥",
        "\u202e",
        "\ud800",
        "\ufeff",
        "<script>",
        "%s%n",
        "${HOME}",
        "a" * 10_000,
    ),
    *(
        "!!python/object/apply:os.system ['true']",
        "!!bool x",
        "!!int ''",
        "!!timestamp x",
        "2001-99-99",
        "[" * 2000,
        "{a: " * 300,
        "&a {x: *a}",
        "[&a [x, x], &b [*a, *a], &c [*b, *b]]",
        "100000000",
        "&a [*a]",
        "*x",
        "- -",
        ": :",
        "algorithm",
        "steps",
        "recipe",
        "data.folder",
        "teacher",
    ),
)


class Slow(BaseException):
    """Five seconds are over."""


def text(rng: random.Random, most: int = 6) -> str:
    glue = rng.choice(("", " ", ".", "=", ": ", "\n"))
    parts = [rng.choice(STRANGE) if rng.random() < 0.7 else rng.choice(caption.VOCABULARY) for _ in range(rng.randint(0, most))]
    joined = glue.join(parts)
    return "".join(c for c in joined if rng.random() > 0.02) if rng.random() < 0.3 else joined


def plain(rng: random.Random) -> str:
    """Text that a file in UTF-8 can hold."""
    return text(rng).encode("utf-8", "ignore").decode()


def thing(rng: random.Random, depth: int = 3) -> object:
    kinds = [text(rng, 2), rng.randint(-3, 10**6), rng.random() * 10 ** rng.randint(-9, 9), None, True, float("nan")]
    if depth and rng.random() < 0.4:
        return [thing(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if depth and rng.random() < 0.4:
        return {text(rng, 1): thing(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(kinds)


def damaged(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        kind = rng.random()
        if not out:
            break
        if kind < 0.3:
            del out[rng.randrange(len(out)) :]
        elif kind < 0.8:
            out[rng.randrange(len(out))] = rng.randrange(256)
        else:
            at = rng.randrange(len(out))
            out[at:at] = rng.randbytes(rng.randint(1, 64))
    return bytes(out)


def overrides(rng: random.Random, here: Path) -> None:
    name, r = registry.resolve("mini-sd35-advdmd")
    keys = [line.split(":")[0].strip() for line in dump(name, r).splitlines()]

    def word() -> str:
        key = f"{rng.choice(('', 'algorithm.', 'match.', 'data.'))}{rng.choice(keys)}"
        value = rng.choice((plain(rng), rng.randint(1, 9), rng.random(), "true"))
        return f"{key}={value}" if rng.random() < 0.9 else plain(rng)

    words = [word() for _ in range(rng.randint(1, 2))]
    registry.resolve(rng.choice((name, name, plain(rng))), words)


def recipe_file(rng: random.Random, here: Path) -> None:
    good = dump(*registry.resolve(rng.choice(("mini-sd35-advdmd", "mini-sd35-dmd2", "mini-sd35-twinflow"))))
    lines = good.splitlines()
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(lines))
        lines[at] = rng.choice((plain(rng), lines[at].split(":")[0] + ": " + plain(rng), lines[at] + plain(rng), ""))
    file = here / "recipe.yaml"
    file.write_bytes(damaged("\n".join(lines).encode(), rng) if rng.random() < 0.3 else "\n".join(lines).encode())
    registry.resolve(str(file))


def prompt(rng: random.Random, here: Path) -> None:
    """Of the miniature, whose rules are checked, to its readers; of any length to its tokenizers."""
    words = " ".join([text(rng, 8)] * rng.choice((1, 1, 1, 2000)))[:100_000]
    if rng.random() < 0.2:
        for tokenizer in tokenizers():
            tokenizer(words.encode("utf-8", "ignore").decode(), truncation=True)
    rng.choice((caption.check_prompt, item_of, caption.parse))(words)


@functools.cache
def tokenizers() -> list[Any]:
    """Of a shipped SD3 and the shipped Qwen-Image."""
    return [loading.load_pipeline(loading.shipped_or_path(name)).tokenizer for name in ("mini-sd35", "mini-qwen")]


def metadata(rng: random.Random, here: Path) -> None:
    rows = [
        thing(rng) if rng.random() < 0.3 else {"text": text(rng), "file_name": rng.choice((*STRANGE, "0.png"))}
        for _ in range(3)
    ]
    content = "\n".join(json.dumps(r) for r in rows).encode("utf-8", "surrogatepass")
    file = here / rng.choice(("metadata.jsonl", "prompts.txt", "p.jsonl"))
    file.write_bytes(damaged(content, rng))
    for e in read_captioned_images(file if rng.random() < 0.7 else here):
        if e.image is not None:
            assert e.image.path.resolve().is_relative_to(here.resolve()), f"outside: {e.image}"


def table(rng: random.Random, here: Path) -> None:
    """A good DPG-Bench table of two prompts, some of whose cells are others; sometimes its bytes too."""
    out = io.StringIO()
    pairs = [(i, k) for i in (1, 2) for k in (1, 2, 3)]
    good = [[f"p{i}", f"prompt {i}", "", str(k), str(k - 1), "entity", "whole", "t", "Is it?"] for i, k in pairs]
    for _ in range(rng.randint(0, 3)):
        row = rng.choice(good)
        row[rng.randrange(len(row))] = rng.choice((plain(rng), str(rng.randint(-2, 9)), "1,3", "3;1"))
    csv.writer(out).writerows([HEAD, *good])
    content = out.getvalue().encode()
    (here / "dpg.csv").write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
    dpg.DPG(str(here / "dpg.csv")).items()


HEAD = (
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"),
    "question_natural_language",
)


def picture(rng: random.Random) -> bytes:
    mode = rng.choice(("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", "YCbCr"))
    kind = rng.choice(("png", "jpeg", "webp", "gif", "tiff", "bmp"))
    size, out = (rng.randint(1, 40), rng.randint(1, 40)), io.BytesIO()
    if rng.random() < 0.02:
        size, mode = (rng.randint(1000, 4000), rng.randint(1, 2000)), "RGB"
    image, moves = Image.new("RGB", size, "red"), [Image.new("RGB", size, c) for c in ("green", "blue")]
    try:
        image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        exif = Image.Exif()
        exif[274] = rng.randint(0, 9)
        several = {"save_all": True, "append_images": moves} if kind in ("gif", "webp", "tiff") else {}
        image.save(out, kind, exif=exif, **several)
    except (OSError, ValueError, KeyError):
        image.convert("RGB").save(out, "png")
    found = out.getvalue()
    if rng.random() < 0.05:  # its header claims an enormous size
        bare = io.BytesIO()
        Image.new("RGB", (8, 8)).save(bare, "png")
        found = bytearray(bare.getvalue())
        found[16:24] = struct.pack(">II", rng.choice((10**5, 2**31 - 1)), rng.choice((10**5, 2**31 - 1)))
        found[29:33] = struct.pack(">I", zlib.crc32(bytes(found[12:29])))
        found = bytes(found)
    return found


def image(rng: random.Random, here: Path) -> None:
    file = here / "x.png"
    file.write_bytes(damaged(picture(rng), rng) if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 200)))
    found = load_image(ImagePlace(file), 16, 16)
    assert found.shape == (3, 16, 16)
    assert np.isfinite(found).all()


def tar(rng: random.Random, here: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for _ in range(rng.randint(0, 4)):
            key = rng.choice(("a", "../a", "/absolute/a", "b/../../c", plain(rng)[:80] or "x"))
            for ending, data in (
                (".png", picture(rng)),
                (rng.choice((".txt", ".json")), text(rng).encode("utf-8", "surrogatepass")),
            ):
                m = tarfile.TarInfo(key + ending)
                m.size = len(data)
                if rng.random() < 0.2:
                    m.type, m.linkname = (
                        rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)),
                        "/etc/passwd",
                    )
                t.addfile(m, io.BytesIO(data))
    (here / "x.tar").write_bytes(damaged(out.getvalue(), rng))
    for e in read_captioned_images(here / "x.tar"):
        assert e.image is not None
        load_image(e.image, 8, 8)


def shard(rng: random.Random, here: Path) -> None:
    """A cache of another program: right hashes, wrong content."""
    n = rng.randint(1, 3)
    tensors = {
        "embeds": torch.zeros(n, 3, 4, dtype=torch.bfloat16),
        "counts": torch.ones(n, dtype=torch.long),
        "latents": torch.zeros(n, 4, 8, 8, dtype=torch.bfloat16),
    }
    for k in list(tensors):
        kind = rng.random()
        if kind < 0.15:
            del tensors[k]
        elif kind < 0.3:
            tensors[k] = torch.zeros([rng.randint(0, 3) for _ in range(rng.randint(0, 4))])
        elif kind < 0.4:
            tensors[k] = tensors[k].to(rng.choice((torch.int8, torch.float64, torch.bool)))
    if rng.random() < 0.5:
        embedding_cache._write(embedding_cache.shard_path(here, 0), tensors, images=[1] * n)
    else:
        save_file(tensors, embedding_cache.shard_path(here, 0))
        embedding_cache.shard_path(here, 0).with_suffix(".json").write_bytes(damaged(b'{"sha256": "0", "images": [1]}', rng))
    embedding_cache.write_null(here, Cond(torch.zeros(1, 3, 4)))
    for name, content in (
        ("plan.json", {"resolution": 32, "teacher": {}}),
        ("manifest.json", {"format": 1, "prompts": n, "images": n, "prompts_without_image": 0}),
    ):
        (here / name).write_bytes(json.dumps(content if rng.random() < 0.7 else thing(rng)).encode("utf-8", "surrogatepass"))
    (here / "prompts.jsonl").write_text('"a"\n' * n)
    kept = embedding_cache.EmbeddingCache(here)
    kept.check_teacher({})
    kept.check_has_images()
    kept.cond(range(n))
    _ = kept.null
    for i in range(n):
        kept.num_images(i)
        kept.real(i, 0)


def records(rng: random.Random, here: Path) -> None:
    """Damaged files of a run or an evaluation: metrics, scores, checkpoints, a model's metadata."""
    rows = [{"step": i, "fake_score/loss": 1.0} for i in range(3)]
    (here / "metrics.jsonl").write_bytes(damaged("\n".join(json.dumps(r) for r in rows).encode(), rng))
    (here / "scores.json").write_bytes(
        damaged(json.dumps({"suite": "s", "suite_hash": "h", "seed": 0, "scores": {"t": {"i": [[0, 1]]}}}).encode(), rng)
        if rng.random() < 0.7
        else json.dumps(thing(rng)).encode("utf-8", "surrogatepass")
    )
    (here / "step-0000001.json").write_bytes(damaged(b'{"step": 1, "sha256": "0", "run": "", "counters": {}}', rng))
    (here / "advdmd.json").write_bytes(json.dumps(thing(rng)).encode("utf-8", "surrogatepass"))
    (here / "model_index.json").write_bytes(json.dumps(thing(rng)).encode("utf-8", "surrogatepass"))
    (here / "perceptions-0of1.jsonl").write_bytes(damaged(b'{"item": "a", "k": 0, "image": "h", "judge": "j"}\n', rng))
    (here / "verdicts.jsonl").write_bytes(damaged(b'{"item": "a", "k": 0, "strict": 1}\n', rng))
    (here / "best.json").write_bytes(damaged(b'{"step": 1, "strict": 0.5, "last": 1}', rng))
    (here / "best.safetensors").write_bytes(damaged(save({"a": torch.zeros(2)}), rng))
    rng.choice(
        (
            lambda: health.diagnose(health.read_metrics(here), health.shipped_ranges()["advdmd/4"]),
            lambda: results.read_scores(here),
            lambda: results.read_verdicts(here),
            lambda: list(judging._lines(here)),
            lambda: validation.load_best(here, torch.nn.ParameterDict({"a": torch.zeros(2)})),
            lambda: checkpoint.latest(here, warn=lambda _: None),
            lambda: loading.load(str(here)),
        )
    )()


KINDS: dict[str, tuple[Callable[[random.Random, Path], None], int]] = {
    "overrides": (overrides, 4),
    "recipe file": (recipe_file, 4),
    "prompt": (prompt, 4),
    "metadata": (metadata, 3),
    "csv": (table, 2),
    "image": (image, 4),
    "tar": (tar, 2),
    "cache": (shard, 2),
    "records": (records, 2),
}


def case(kind: str, seed: int) -> str:
    """What came of one case: fine, refused, or the finding."""
    rng, end = random.Random(f"{kind}/{seed}"), ""
    with tempfile.TemporaryDirectory() as root:
        here = Path(root) / "in"
        here.mkdir()
        Image.new("RGB", (4, 4)).save(here / "0.png")
        signal.setitimer(signal.ITIMER_PROF, 5)  # seconds of this process, whatever else the machine does
        signal.alarm(60)
        try:
            KINDS[kind][0](rng, here)
            end = "fine"
        except (ValueError, OSError) as e:
            end = "refused" if str(e) else "an error that says nothing"
        except FloatingPointError:
            end = "refused"
        except Slow:
            end = "slow"
        except Exception:
            end = traceback.format_exc(limit=-3)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if [p.name for p in Path(root).iterdir()] != ["in"]:
            end = "wrote outside of the folder"
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    def late(*_: object) -> None:
        raise Slow

    for kind in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(kind, late)
    torch.set_num_threads(1)
    loading.silence_libraries()
    tokenizers()  # reading them is no part of a case
    total, rows, bad = sum(w for _, w in KINDS.values()), {}, 0
    for kind, (_, weight) in KINDS.items():
        count: Counter[str] = Counter()
        for i in range(-(-args.cases * weight // total)):
            end = case(kind, args.seed * 10**6 + i)
            if end not in ("fine", "refused"):
                bad += 1
                if bad <= 20:
                    print(f"--- {kind}, case {i}: {end}", flush=True)
            count[end if end in ("fine", "refused", "slow") else "finding"] += 1
        rows[kind] = dict(count)
        print(kind, rows[kind], flush=True)
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        cases = sum(sum(r.values()) for r in rows.values())
        args.out.write_text(json.dumps({"commit": commit, "seed": args.seed, "cases": cases, "rows": rows}, indent=1))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
