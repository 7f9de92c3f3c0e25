"""A run's results as text, as a page of the documents, and as plots."""

from pathlib import Path

from bench import sizes
from bench.sizes import Size
from harness import registry

OWN, EAGER = "kernels", "eager"
PLOTTED = ("decode_metadata", "target_verify_metadata", "draft_extend_metadata", "fused_metadata_copy_multi",
           "gather_page_table", "create_flashinfer_kv_indices", "page_table_1_flattened")
_ONE_COPY = "eager is one copy of a slice, which torch dispatches in C++"
WHY_SLOWER = {("cp_round_robin_split", "host"): _ONE_COPY, ("cp_round_robin_split_rows", "host"): _ONE_COPY}


class Results:
    """A run, by subject, transform and size."""

    def __init__(self, results: dict):
        self.machine, self.when = results["machine"], results["when"]
        self.rows = {(r["subject"], r["transform"], Size(r["batch"], r["context"])): r for r in results["rows"]}
        self.floors = {f["floor"]: f for f in results["floors"]}
        self.upstreams = [n for n in self.machine if n not in (OWN, EAGER)]
        self.keys = list(dict.fromkeys((t, s) for _, t, s in self.rows if t in registry.contracts()))

    def median(self, subject: str, transform: str, size: Size, what: str) -> float | None:
        return self.rows.get((subject, transform, size), {}).get(what, {}).get("median")

    def floor(self, transform: str, size: Size) -> float | None:
        """Microseconds in which a large copy would move the bytes that the contract needs."""
        row, copy = self.rows.get((OWN, transform, size), {}), self.floors.get("a copy of 1 GiB")
        if copy is None or row.get("written_bytes") is None:
            return None
        return (row["read_bytes"] + row["written_bytes"]) / copy["bytes_per_us"]


def headlines(results: Results) -> list[str]:
    """The comparisons that the plans are for, with their ratios; a part that was not measured is a dash."""
    lines = []
    for size in (s for t, s in results.keys if t == "decode_metadata"):
        ours = {w: results.median(OWN, "decode_metadata", size, w) for w in ("host", "plan_host", "gpu", "replay_host")}
        lines.append(f"{sizes.BACKENDS} draft backends, {size}: plan {_us(ours['plan_host'])} host, {_us(ours['gpu'])} GPU; "
                     f"checked call {_us(ours['host'])} host; replay {_us(ours['replay_host'])} host")
        floor, empty = results.floor("decode_metadata", size), results.floors.get("an empty launch", {}).get("gpu", {})
        lines.append(f"  floor {_us(floor)} GPU (an empty launch {_us(empty.get('median'))}): "
                     f"{_ratio(ours['gpu'], floor)} times the floor")
        lines += _ragged(results, size)
        for name in results.upstreams:
            lines += [f"  {name}: {text}" for text in _against(results, name, size, ours)]
    return lines


def _ragged(results: Results, size: Size) -> list[str]:
    """The same for lengths from half the context to all of it; the copies copy as many columns as the longest request has."""
    gpu, floor = results.median(OWN, "ragged_decode", size, "gpu"), results.floor("ragged_decode", size)
    if gpu is None:
        return []
    copies = [(name, results.median(name, "multi_copy", size, "gpu")) for name in results.upstreams]
    told = "".join(f", {_ratio(gpu, copy)} of {name}'s copy" for name, copy in copies if copy is not None)
    return [f"  lengths from half of it to all of it: {_us(gpu)} GPU, {_ratio(gpu, floor)} times the floor for these{told}"]


def _against(results: Results, name: str, size: Size, ours: dict) -> list[str]:
    lines = []
    prepare, copy = (results.median(name, what, size, "host") for what in ("precompute", "multi_copy"))
    if prepare is not None and copy is not None:
        gpu = results.median(name, "multi_copy", size, "gpu")
        lines.append(f"precompute {_us(prepare)} and fused copy {_us(copy)} host, {_us(gpu)} GPU: plan "
                     f"{_ratio(ours['plan_host'], prepare + copy)} of both on the host, {_ratio(ours['gpu'], gpu)} of the copy "
                     f"on the GPU, where the floor is {_ratio(results.floor('decode_metadata', size), gpu)} of it")
    elif prepare is not None:
        lines.append(f"precompute {_us(prepare)} host: plan {_ratio(ours['plan_host'], prepare)} of it; the copy: "
                     f"{_why(results, name, 'multi_copy', size)}")
    three, gpu = (results.median(name, "three_decodes", size, w) for w in ("host", "gpu"))
    if three is not None:
        lines.append(f"{sizes.BACKENDS} fused decodes {_us(three)} host, {_us(gpu)} GPU: plan "
                     f"{_ratio(ours['plan_host'], three)} and checked call {_ratio(ours['host'], three)} of it on the host, "
                     f"{_ratio(ours['gpu'], gpu)} on the GPU")
    return lines


def table(results: Results, family: str) -> list[str]:
    """A family's rows in Markdown: medians in microseconds, quartiles in brackets for our own plan."""
    head = ["transform", "size", "checked", "plan", "replay", "GPU", "eager", "eager GPU"]
    head += [f"{u}{what}" for u in results.upstreams for what in ("", " GPU")] + ["floor", "GPU / floor", "remark"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 3) + " --- |"]
    contracts = registry.contracts()
    order = sorted((k for k in results.keys if contracts[k[0]].family == family),
                   key=lambda k: (k[0], k[1].batch, k[1].context))
    for transform, size in order:
        row = results.rows.get((OWN, transform, size), {})
        floor = results.floor(transform, size)
        cells = [f"`{transform}`", str(size), _cell(row, "host"), _cell(row, "plan_host"), _cell(row, "replay_host"),
                 _cell(row, "gpu")]
        for subject in (EAGER, *results.upstreams):
            other = results.rows.get((subject, transform, size), {})
            cells += [_cell(other, "host"), _cell(other, "gpu")]
        cells += [_number(floor), _ratio(row.get("gpu", {}).get("median"), floor), remark(results, transform, size)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def remark(results: Results, transform: str, size: Size) -> str:
    """What a reader must know: where ours is slower than eager PyTorch, and what has no number."""
    said = []
    row = results.rows.get((OWN, transform, size), {})
    best = min((row[w]["median"] for w in ("host", "plan_host") if w in row), default=None)
    for what, mine in (("host", best), ("gpu", row.get("gpu", {}).get("median"))):
        theirs = results.median(EAGER, transform, size, what)
        if mine is not None and theirs is not None and mine > 1.05 * theirs:
            why = f": {WHY_SLOWER[transform, what]}" if (transform, what) in WHY_SLOWER else ""
            said.append(f"slower than eager ({'GPU' if what == 'gpu' else what} {mine / theirs:.2f}x){why}")
    late = []
    for subject in (OWN, EAGER, *results.upstreams):
        why = _why(results, subject, transform, size)
        if why.startswith("left out: after"):
            late.append(subject)
        elif why and not why.startswith("not provided"):
            said.append(f"{subject}: {why}")
    if late:
        said.append("no time for " + ", ".join(late))
    if "no_plan" in row:
        said.append("no plan")
    return "; ".join(said).replace("|", "/")


def console(results: dict) -> list[str]:
    run = Results(results)
    slower = [f"  {t}, {s}: {remark(run, t, s)}" for t, s in run.keys if remark(run, t, s)]
    return [*headlines(run), *(["remarks:", *slower] if slower else [])]


def write(results: dict, docs: Path, name: str = "performance") -> int:
    """A page of that name, and its plots."""
    try:
        import matplotlib
    except ImportError:
        print("ci/bench --render draws with matplotlib: pip install matplotlib (the extra `bench` of pyproject.toml)")
        return 2
    matplotlib.use("Agg")
    run = Results(results)
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    gpu, host = f"{name}-gpu-time.png", f"{name}-host-time.png"
    plot(run, images / gpu, "gpu", "GPU time, µs")
    plot(run, images / host, "plan_host", "host time of a plan, µs")
    (docs / f"{name}.md").write_text(page(run, f"images/{gpu}", f"images/{host}"))
    print(f"wrote {docs / name}.md, {images / gpu}, {images / host}")
    return 0


def page(run: Results, gpu: str, host: str) -> str:
    machine = "\n".join(f"| {name} | " + ", ".join(f"{k} {v}" for k, v in about.items()) + " |"
                        for name, about in run.machine.items())
    empty, copy = run.floors.get("an empty launch", {}), run.floors.get("a copy of 1 GiB", {})
    families = list(dict.fromkeys(registry.contracts()[t].family for t, _ in run.keys))
    tables = "\n\n".join(f"### {family}\n\n" + "\n".join(table(run, family)) for family in families)
    return f"""# Performance on {run.machine[OWN].get("device", "a CPU")}

Written by `ci/bench --render`; measured by one run of `ci/bench` on {run.when}. Compare numbers of one run only.

| subject | machine and versions |
| --- | --- |
{machine}

Microseconds, medians; in brackets the quartiles. **checked** is the plain call with all its checks, **plan** the same launch
bound once and called with new one-dimensional inputs, **replay** the replay of a CUDA graph that holds the call: all three
are time that the host is busy. **GPU** is the time of a call in a graph of up to 20, enqueued while the GPU was still busy,
the L2 cache not flushed. **floor** is the time in which a copy of 1 GiB would move the bytes that the contract needs, each
live input cell read once and each written cell written once, at the {copy.get("bytes_per_us", 0) / 1e6:.2f} TB/s that such
a copy reached; an empty launch took {_cell(empty, "host")} µs of the host, {_cell(empty, "plan_host")} as a plan, and
{_cell(empty, "gpu")} of the GPU. Upstream's kernels are called as the suite's adapters call them, which costs a few
microseconds of the host; in the headlines they are called with ready tensors.

## Headlines

```text
{chr(10).join(headlines(run))}
```

## Growth

![GPU time against context and batch]({gpu})

![Host time against context and batch]({host})

## Every transform

{tables}
"""


def plot(run: Results, path: Path, what: str, label: str) -> None:
    """Two panels: against the context at batch 8, and against the batch at context 8k. Dashes are the floor."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for panel, axis, fixed in zip(panels, ("context", "batch"), (("batch", 8), ("context", 8 << 10))):
        for k, transform in enumerate(PLOTTED):
            along = sorted((s for t, s in run.keys if t == transform and getattr(s, fixed[0]) == fixed[1]),
                           key=lambda s: getattr(s, axis))
            for style, value in (("o-", lambda s: run.median(OWN, transform, s, what)),
                                 ("--", lambda s: run.floor(transform, s) if what == "gpu" else None)):
                points = [(getattr(s, axis), value(s)) for s in along if value(s) is not None]
                if points:
                    panel.plot(*zip(*points), style, color=f"C{k}", lw=1 if style == "--" else 1.8, ms=4,
                               label=transform if style == "o-" else None)
        panel.set(xscale="log", yscale="log", xlabel=f"{axis} ({fixed[0]} {fixed[1]:,})")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    if panels[0].lines:
        panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _why(results: Results, subject: str, transform: str, size: Size) -> str:
    row = results.rows.get((subject, transform, size), {})
    if "not_provided" in row:
        return f"not provided: {row['not_provided']}"
    known = ("failed", "gpu_failed", "left_out", "unsupported")
    return next((f"{key.replace('_', ' ')}: {row[key]}" for key in known if key in row), "")


def _cell(row: dict, what: str) -> str:
    if what not in row:
        return "-"
    t = row[what]
    waited = " (waits)" if what == "gpu" and not row.get("gpu_how", "graph").startswith("graph") else ""
    return f"{t['median']:.1f} ({t['low']:.1f}-{t['high']:.1f}){waited}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} µs"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if not a or not b else f"{a / b:.2f}"
