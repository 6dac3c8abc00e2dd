"""The command `hf-opentrans`: parses, calls the library, prints. One module per group of commands."""

import sys

from hf_opentrans._memory import keep_freed_memory
from hf_opentrans.cli import analyze as _analyze  # noqa: F401 (registers its commands)
from hf_opentrans.cli import app as _app  # noqa: F401
from hf_opentrans.cli import benchmark as _benchmark  # noqa: F401
from hf_opentrans.cli import benchmark_cold_start as _benchmark_cold_start  # noqa: F401
from hf_opentrans.cli import benchmark_cuts as _benchmark_cuts  # noqa: F401
from hf_opentrans.cli import benchmark_elastic as _benchmark_elastic  # noqa: F401
from hf_opentrans.cli import benchmark_latency as _benchmark_latency  # noqa: F401
from hf_opentrans.cli import benchmark_metric as _benchmark_metric  # noqa: F401
from hf_opentrans.cli import benchmark_semi_structured as _benchmark_semi_structured  # noqa: F401
from hf_opentrans.cli import benchmark_transfer as _benchmark_transfer  # noqa: F401
from hf_opentrans.cli import commands as _commands  # noqa: F401
from hf_opentrans.cli import elastic as _elastic  # noqa: F401
from hf_opentrans.cli import evaluate as _evaluate  # noqa: F401
from hf_opentrans.cli import export as _export  # noqa: F401
from hf_opentrans.cli import latency as _latency  # noqa: F401
from hf_opentrans.cli import precision as _precision  # noqa: F401
from hf_opentrans.cli import push as _push  # noqa: F401
from hf_opentrans.cli import train as _train  # noqa: F401
from hf_opentrans.cli import transfer as _transfer  # noqa: F401
from hf_opentrans.cli._common import app, repeat_options
from hf_opentrans.loading import quiet_transformers


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    with quiet_transformers():
        app(args=repeat_options(sys.argv[1:]), prog_name="hf-opentrans")
