"""`ssl-nb` as a test calls it: in this process, which spares a start of Python, or in one of its
own.
"""
import contextlib, io, os, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from run_notebook import ROOT
from ssl_nb.workbench.command_line import main

COMMAND = Path(sys.executable).parent / "ssl-nb"


def settings_of(runs, environ):
    return {**environ, **({"SSL_NB_RUNS": str(runs)} if runs else {})}


def in_process(*words, runs=None, **environ):
    "What the command prints and how it ends, without a process of its own."
    out, err, code = io.StringIO(), io.StringIO(), 0
    polite = signal.getsignal(signal.SIGTERM)
    with (mock.patch.dict(os.environ, settings_of(runs, environ)), contextlib.chdir(ROOT),
          mock.patch.object(sys, "argv", ["ssl-nb", *map(str, words)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try: main()
        except SystemExit as e: code = e.code or 0
        finally: signal.signal(signal.SIGTERM, polite)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def in_own_process(*words, runs=None, **environ):
    "The same as a user's shell starts it."
    environ = {**os.environ, **settings_of(runs, environ)}
    return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True, cwd=ROOT,
                          env=environ, timeout=300)
