"""`python -m dflash ...`: a thin layer of arguments over the functions that Python users call."""

import sys

import tyro

from dflash.cli.audit import audit
from dflash.cli.audit_teacher import audit_teacher_command
from dflash.cli.build_cache import build_cache
from dflash.cli.doctor import doctor
from dflash.cli.evaluate import evaluate
from dflash.cli.export import export
from dflash.cli.generate import generate
from dflash.cli.report import export_results, report
from dflash.cli.serve_bench import serve_bench
from dflash.cli.train import train
from dflash.config import ConfigError
from dflash.decoding.decode import RequestError
from dflash.device import DeviceError
from dflash.easydel import EasyDelError
from dflash.prompts import PromptError
from dflash.report.run import ReportError
from dflash.serving.server import ServingError
from dflash.teacher_cache.arrays import CacheError
from dflash.tokenizer import TokenizerError
from dflash.training.run import TrainingError
from dflash.weights.smollm2 import SnapshotError
from dflash.weights.snapshot import WeightsError

USER_ERRORS = (
    CacheError,
    ConfigError,
    DeviceError,
    EasyDelError,
    PromptError,
    ReportError,
    RequestError,
    ServingError,
    SnapshotError,
    TokenizerError,
    TrainingError,
    WeightsError,
)


def main() -> int:
    """Exit code 0; 1 for a defect that an audit found or a host to mend; 2, with one sentence, for a user's mistake."""
    app = tyro.extras.SubcommandApp()
    app.command(name="generate")(generate)
    app.command(name="build-cache")(build_cache)
    app.command(name="train")(train)
    app.command(name="evaluate")(evaluate)
    app.command(name="report")(report)
    app.command(name="export-results")(export_results)
    app.command(name="export")(export)
    app.command(name="audit")(audit)
    app.command(name="audit-teacher")(audit_teacher_command)
    app.command(name="doctor")(doctor)
    app.command(name="serve-bench")(serve_bench)
    try:
        app.cli(prog="dflash", description="DFlash: lossless speculative decoding, measured.")
    except USER_ERRORS as error:
        print(f"dflash: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dflash: interrupted", file=sys.stderr)
        return 130
    return 0
