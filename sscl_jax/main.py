"""Trains, or goes on with a training.

    python -m sscl_jax.main --config=configs/acdc.py:anatomical_pl --workdir=runs/acdc

The method stands behind the colon. Every field of the config is an option too, as --config.steps=2000; docs/config.md
and configs/base.py list them.

Exit status: 0 done; 1 input or config cannot be used; 130 or 143 stopped by SIGINT or SIGTERM, saved before leaving.
"""

import errno
import os
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import configs
from sscl_jax import cli, parallel

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with the method behind a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs, tables and pictures.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan (data, steps, memory, time) and stop.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes that jax finds itself, as on a TPU pod.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where jax cannot find it itself.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, with --coordinator.")


def main(argv: list[str]) -> None:
    """Trains; what the user can mend ends in one line and exit status 1."""
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: flags start with --; see --help.")
    logging.set_verbosity(logging.WARNING)  # jax and Orbax tell every step of their work at INFO
    try:
        parallel.initialise_hosts(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
        if not _DRY_RUN.value:
            parallel.keep_compiled()
        from sscl_jax import plan, train  # the devices are known from here on

        assert _WORKDIR.value  # required
        go = plan.show_plan if _DRY_RUN.value else train.train
        go(_CONFIG.value, Path(_WORKDIR.value))
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SSCL_TRACEBACK"):
            raise
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = ": free some, then run the same command again, it goes on from the last checkpoint" if full else ""
        sys.exit(f"error: {' '.join(str(error).split())}{remedy}")
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("SSCL_TRACEBACK") or not parallel.out_of_memory(error):
            raise
        sys.exit(
            f"error: out of memory ({' '.join(str(error).split())[:200]}): lower data.unlabeled_batch, "
            "data.labeled_batch or data.patch_size, or set model.remat=True or data.device_memory=0."
        )
    except KeyboardInterrupt:  # not while it trains: then it saves
        print("stopped", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # XLA can crash when Python tidies up while it compiles


def run() -> None:
    """Entry point of `sscl-train`."""
    flags.mark_flags_as_required(["config", "workdir"])
    sys.modules["__main__"].__doc__ = __doc__  # with --help, absl shows what belongs to the file that was started
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    with parallel.ending_together():
        app.run(main, flags_parser=_parse)


def find_config(word: str) -> str:
    """`--config=configs/acdc.py` names the file installed with the package, unless there is one in this folder."""
    match = re.fullmatch(r"(--config=)?(configs/\w+\.py)(:\w+)?", word)
    if match and not Path(match[2]).is_file():
        installed = Path(configs.__file__).parents[1] / match[2]
        if installed.is_file():
            return f"{match[1] or ''}{installed}{match[3] or ''}"
    return word


def read_config(options: list[str]) -> ConfigDict:
    """The config that a command line means, without its other flags; ends as the command would where it means none."""
    words, values = ["sscl_jax.main", *options], flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "Config file.", values, sys_argv=words)
    _parse(words, values)
    return config.value


def _parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags; a config that is not there, or has no such field or method, ends in one line."""
    try:
        return values([find_config(word) for word in cli.underscored(argv)])
    except SystemExit as stop:  # absl leaves with status 1 when it has printed the help
        sys.exit(0 if any(re.match("--?help", word) for word in argv) else stop.code or 1)
    except (flags.Error, OSError, ImportError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if any(line.startswith("Traceback") for line in lines):  # what a config file raised, in the middle of it
            lines = [line for line in lines if re.match(r"\w+(Error|Exception): ", line)]
        sys.exit(f"error: {' '.join(lines).rstrip('.')}. See --help.")
    except AttributeError as error:  # ml_collections quotes its message several times over
        text = re.sub(r"[\"'\\]", "", re.sub(r"\\+n", ". ", str(error)))
        sys.exit(f"error: the config has no field {text} configs/base.py lists all fields.")


if __name__ == "__main__":
    run()
