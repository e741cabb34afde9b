"""What a command says and how it ends when it is told to stop, and what its processes do."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from local_elasticity.cli import main

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signals of POSIX"),
]

TRACK = ["track", "--classes", "0", "1", "--epochs", "200", "--probes-per-class", "3", "--every", "9"]
DRIVER = """
import os, signal, sys, threading, time
from local_elasticity import cli

@cli.app.command
def wait(how: str = "plain"):
    from rich.progress import Progress
    if how == "importing":
        sys.path.insert(0, os.environ["FOLDER"])
        import slow_to_import
    with Progress(console=cli.console, disable=how != "bar") as bar:
        bar.add_task("waiting", total=9)
        for word in ("ready", "again"):
            try:
                print(word, flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                if how == "mistaken":
                    raise ImportError("a module that was half there")
                if how == "swallowed":
                    return 0
                if how != "stubborn":
                    raise

cli.main()
"""


def started(command, folder, **options):
    environment = os.environ | {"FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
        **options,
    )


def ended(process):
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["plain", "bar", "mistaken", "swallowed", "stubborn", "importing"])
def test_a_signal_ends_a_command_with_one_line(tmp_path, number, how):
    (tmp_path / "slow_to_import.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = started(["-c", DRIVER, "wait", how], tmp_path)
    assert "ready" in process.stdout.readline() or "ready" in process.stdout.readline()
    process.send_signal(number)
    if how == "stubborn":
        assert process.stdout.readline() == "again\n"
        process.send_signal(number)
    _, said = ended(process)
    assert process.returncode == 128 + number
    assert said == "local-elasticity: interrupted; the same command starts over\n"


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["track"], "interrupted; the same command continues from the last snapshot"),
        (
            ["track", "--overwrite"],
            "interrupted; the same command without --overwrite continues from the last snapshot",
        ),
        (["train", "--out", "x"], "interrupted; the same command continues from the last checkpoint"),
        (["reproduce", "all"], "interrupted; the same command continues with what is not yet done"),
        (["measure"], "interrupted; nothing was written"),
        (["simulate", "--overwrite"], "interrupted; the same command starts over"),
        ([], "interrupted; the same command starts over"),
    ],
)
def test_the_line_says_what_is_true_of_the_command(monkeypatch, capsys, words, end):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("local_elasticity.cli.entry.app", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert (caught.value.code, capsys.readouterr().err) == (130, f"local-elasticity: {end}\n")


def test_a_run_is_interrupted_without_a_traceback(tmp_path):
    process = started(["-m", "local_elasticity.cli", *TRACK, "--out", "run"], tmp_path)
    while "update 10" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = ended(process)
    line = "local-elasticity: interrupted; the same command continues from the last snapshot"
    assert (process.returncode, said.splitlines()[-1:]) == (143, [line])
    assert "Traceback" not in said


def test_the_signal_of_a_terminal_reaches_workers_which_say_nothing(tmp_path):
    """Ctrl-C goes to every process of the group: the workers leave it to the one that waits for them."""
    code = """
import sys, time
from pathlib import Path
from local_elasticity import cli
from local_elasticity.base import parallel
sys.path.insert(0, ".")
import task_of_the_test

@cli.app.command
def wait():
    tasks = [parallel.Task(f"{i}", task_of_the_test.sleep, (i,), Path(f"{i}.json")) for i in range(2)]
    parallel.perform(tasks, parallel.Workers("loky", 2))

cli.main()
"""
    (tmp_path / "task_of_the_test.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "def sleep(i):\n    Path(f'{i}.pid').write_text(str(os.getpid()))\n    time.sleep(60)\n    return {}\n"
    )
    process = started(["-c", code, "wait"], tmp_path)
    limit = time.monotonic() + 50
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(0.2)
    workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, said = ended(process)
    assert process.returncode == 130
    assert said == "local-elasticity: interrupted; the same command starts over\n"
    assert not any(os.path.exists(f"/proc/{worker}/cwd") for worker in workers)


def test_a_reader_that_has_gone_ends_a_command_quietly(tmp_path):
    process = started(["-m", "local_elasticity.cli", "data"], tmp_path)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(60), said) == (141, "")


def test_importing_the_library_installs_no_handlers_and_does_not_load_torch():
    code = (
        "import signal, sys\nbefore = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
        "import local_elasticity.cli, local_elasticity as le\nassert 'torch' not in sys.modules\nle.measure\n"
        "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_handlers_are_those_of_before_when_a_command_is_over(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert re.match(r"\d", capsys.readouterr().out)
