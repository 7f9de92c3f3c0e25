"""Measures one subject, in a process of its own: `python -m bench.child REQUEST.json`.

Every result is a line of JSON on the file that the request names, written as soon as it is there. A row that fails says
why; if it took the process along, the parent starts another for the rest.
"""

import importlib.metadata
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(path: str) -> None:
    request = json.loads(Path(path).read_text())
    if request["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = request["paths"]
    import torch

    from bench import composite, rows
    from harness.worker.subject import Subject

    if request["device"] == "cpu":
        from triton.runtime import interpreter

        from harness.worker.interpreter import loop_bounds_from_memory

        loop_bounds_from_memory(interpreter)
    torch.set_num_threads(1)
    deadline = time.monotonic() + request["seconds"]
    bench = rows.Bench(Subject(request["subject"], ROOT), request["subject"], request["device"], request["each"])
    with open(request["out"], "a", buffering=1) as out:

        def write(row: dict) -> None:
            out.write(json.dumps({"subject": request["name"], **row}) + "\n")

        if request["first"]:
            write({"machine": machine(request["device"])})
        if request["first"] and request["subject"] == "kernels":
            for floor in bench.floors():
                write(floor)
        for name, batch, context in request["rows"]:
            where = {"transform": name, "batch": batch, "context": context}
            write({"started": [name, batch, context]})
            if time.monotonic() > deadline:
                write({**where, "left_out": f"after {request['seconds']} s of this subject"})
                continue
            composed = any(name in names for names in composite.NAMES.values())
            measure = partial(composite.measure, bench) if composed else bench.row
            try:
                write({**where, **measure(name, batch, context)})
            except Exception as error:  # told in the table, with its last line of code
                last = traceback.extract_tb(error.__traceback__)[-1]
                said = str(error).strip().split("\n")[0][:160]
                write({**where, "failed": f"{type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})"})
                if request["device"] != "cpu":
                    torch.cuda.synchronize()  # a context that is lost ends this process here
                    torch.cuda.empty_cache()
        write({"done": True})


def machine(device: str) -> dict:
    """What a number depends on."""
    import torch
    import triton

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    try:
        versions["sglang"] = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        pass
    if device == "cpu":
        return {"device": "cpu (Triton's interpreter)", **versions}
    about = torch.cuda.get_device_properties(0)
    return {"device": about.name, "memory GiB": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda, **versions}


if __name__ == "__main__":
    main(sys.argv[1])
