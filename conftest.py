"""The doorway of pytest: options, header, the worker of each subject, and the verdict table.

    pytest -n auto                                    everything, our own kernels
    pytest --subject my_kernels.py -k decode          your kernel
    pytest --subject sglang --subject-path DIR        an SGLang unpacked in DIR
    pytest --profile gate -m gate                     the gate's lanes
    pytest --inline --pdb -k seqlens_expand           one process, for a debugger

PLUMBLINE_PROFILE and PLUMBLINE_SUBJECT stand for --profile and --subject where those are not given.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

import hypothesis
import pytest

from harness import devices, registry
from harness.campaign import PROFILES
from harness.client import ROOT, InfraError, Inline, UsageError, Worker, WorkerOptions, subject_name
from harness.contract import Case
from harness.generation import same_everywhere
from harness.progress import Progress
from harness.reporting import Reporting, attach
from harness.verdicts import Row

WORKERS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("plumbline")
    group.addoption("--subject", action="append", help="whose kernels: kernels, plans, eager, sglang, a .py file or a module")
    group.addoption("--subject-python", default=sys.executable, help="the interpreter that holds the subjects")
    group.addoption("--subject-path", action="append", default=[], help="a folder to import subjects from")
    group.addoption("--variant", action="append", default=[], help="CONTRACT:RULE=CHOICE, over what the subject declares")
    group.addoption("--profile", default=os.environ.get("PLUMBLINE_PROFILE", "quick"), help=", ".join(PROFILES))
    group.addoption("--device", default="auto", help="cpu, cuda or auto")
    group.addoption("--require-gpu", action="store_true", help="fail where there is no GPU")
    group.addoption("--overflow", action="store_true",
                    help="on a GPU: compile Triton kernels with its checks of integer overflow; one that wraps is a finding")
    group.addoption("--inline", action="store_true", help="run subjects in this process, for a debugger")
    group.addoption("--report", type=Path, help="write summary.md, index.html and verdicts.json to this folder")
    group.addoption("--progress", action="store_true", help="how far the run is and how long it has left, instead of dots")


# The suite's own property tests: the same examples on every machine, and no deadline on a busy one.
hypothesis.settings.register_profile("plumbline", deadline=None, derandomize=True, database=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("plumbline")
same_everywhere()


def pytest_configure(config):
    config.stash[WORKERS] = {}
    if config.option.profile not in PROFILES:
        raise pytest.UsageError(f"--profile {config.option.profile}: known are {', '.join(PROFILES)}")
    if config.option.device not in ("auto", "cpu", "cuda"):
        raise pytest.UsageError(f"--device {config.option.device}: known are auto, cpu, cuda")
    if config.option.device == "cuda" or config.option.require_gpu:
        if not devices.gpus():
            asked = "--require-gpu" if config.option.require_gpu else "--device cuda"
            raise pytest.UsageError(f"{asked}: no GPU is visible here (nvidia-smi lists none)")
        config.option.device = "cuda"
    config.option.device = devices.resolve(config.option.device)
    if config.option.overflow and config.option.device != "cuda":
        raise pytest.UsageError(devices.NO_OVERFLOW)
    for text in config.option.variant:
        _variant(text)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporting(config, header(config)), "plumbline-reporting")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    if session.config.option.progress and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Progress(session.config), "plumbline-progress")


def pytest_xdist_auto_num_workers(config):
    return devices.worker_count(devices.resolve(config.option.device))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests take from a millisecond to a minute: a process that is done takes over what another has still queued."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def subjects(config) -> list[str]:
    given = config.option.subject or os.environ.get("PLUMBLINE_SUBJECT", "kernels").split(",")
    return [subject_name(s) for s in given]


def _variant(text: str) -> tuple[str, str, str]:
    try:
        return registry.variant(text)
    except ValueError as error:
        raise pytest.UsageError(f"--variant {error}") from None


def header(config) -> list[str]:
    """Everything a run depends on, so that a typo shows."""
    versions = " ".join(f"{p} {_version(p)}" for p in ("numpy", "hypothesis", "pytest", "torch", "triton"))
    watched = "guard pages; " + ("checks of integer overflow; " if config.option.overflow else "")
    device = f"cuda ({watched}" + ", ".join(devices.gpus()) + ")" if config.option.device == "cuda" else (
        "cpu (Triton's interpreter with shadow memory; guard pages, CUDA graphs and compute-sanitizer left out)")
    return [
        f"plumbline {_project_version()}: profile {config.option.profile}, subjects {', '.join(subjects(config))}, "
        f"variants {', '.join(config.option.variant) or 'as each subject declares'}",
        f"device {device}",
        f"python {sys.version.split()[0]} {versions}",
        "environment " + (" ".join(f"{k}={v}" for k, v in sorted(os.environ.items())
                                   if k.startswith(("PLUMBLINE_", "HYPOTHESIS_", "TRITON_"))) or "none of ours set"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not here)"


def _project_version() -> str:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def pytest_report_header(config):
    return header(config)


def pytest_make_parametrize_id(val, argname):
    """Ids that say what they are, where pytest would number them: `--collect-only` is a table of contents."""
    if isinstance(val, (str, type)) or callable(val):
        return None
    if isinstance(val, Case):
        return val.contract.name
    if isinstance(val, (bool, int, float)) or val is None:
        return f"{argname}={val}"
    if isinstance(val, (set, frozenset)):
        val = sorted(val)  # every process of -n must give the same id
    text = " ".join(repr(val).split()).replace("[", "(").replace("]", ")")
    return text if len(text) <= 60 else text[:59] + "…"


def pytest_generate_tests(metafunc):
    """`transform` runs over the module's FAMILY, `subject` over --subject."""
    if "transform" in metafunc.fixturenames and hasattr(metafunc.module, "FAMILY"):
        family = metafunc.module.FAMILY
        metafunc.parametrize("transform", [n for n, c in registry.contracts().items() if c.family == family])
    if "subject" in metafunc.fixturenames:
        names = subjects(metafunc.config)
        metafunc.parametrize("subject", names, ids=[Path(n).stem for n in names])


class Session:
    """What a test needs of the run: workers by subject, the profile, the chosen variants."""

    def __init__(self, config):
        self.config = config
        self.profile = PROFILES[config.option.profile]

    def worker(self, subject: str, limit: float = 20.0):
        """The worker that holds a subject, started once per test process."""
        workers = self.config.stash[WORKERS]
        if subject not in workers:
            device = self.config.option.device
            number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
            options = WorkerOptions(subject, device, self.config.option.subject_python,
                                    tuple(self.config.option.subject_path), limit,
                                    environment=devices.environment(device, number, self.config.option.overflow))
            kind = Inline if self.config.option.inline else Worker
            workers[subject] = kind(options, list(registry.contracts().values()))
        return workers[subject]

    def rules(self, subject: str, transform: str) -> dict[str, str]:
        """The subject's variant, with --variant on top."""
        chosen = dict(self.worker(subject).describe[transform]["variant"])
        for name, key, choice in map(_variant, self.config.option.variant):
            if name == transform:
                chosen[key] = choice
        return registry.contracts()[transform].rules(chosen)


@pytest.fixture(scope="session")
def session(pytestconfig) -> Session:
    return Session(pytestconfig)


def pytest_unconfigure(config):
    for worker in config.stash.get(WORKERS, {}).values():
        worker.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """An error of use or of the suite is one line, not a traceback."""
    report = (yield).get_result()
    attach(item, call, report)
    given = getattr(item, "funcargs", {})
    # In a lane also what the machine denies, a full disk say: the subject was not judged.
    ours = (UsageError, InfraError, *((OSError,) if "session" in given else ()))
    if call.excinfo is not None and call.excinfo.errisinstance(ours):
        label = "ERROR" if call.excinfo.errisinstance(UsageError) else "INFRA"
        report.longrepr = f"{label}  {call.excinfo.value}"
        if "subject" in given and (transform := _transform(given)):
            row = Row(given["subject"], transform, "infra", "INFRA", notes=[str(call.excinfo.value)])
            report.user_properties.append(("verdict", row.dump()))


def _transform(given: dict) -> str:
    """The transform that a test is about, or ''."""
    if "transform" in given:
        return given["transform"]
    if "path" in given:  # of a saved case
        return given["path"].stem.split("-")[0]
    case = given.get("case", given.get("example"))
    return case.contract.name if hasattr(case, "contract") else ""
