"""Signals are heard while a call is in compiled code; a second one is told from the first, which may come more than once."""

import hashlib
import os
import signal
import subprocess
import sys
import time

from leanlm.launch.signals import Heard


def test_a_second_signal_is_heard_while_compiled_code_runs() -> None:
    calls: list[tuple[str, int, float]] = []
    heard = Heard(
        lambda n: calls.append(("first", n, time.monotonic())), lambda n: calls.append(("again", n, time.monotonic()))
    )
    before = signal.getsignal(signal.SIGUSR1)
    begin = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = int(100_000 * 6 / (time.monotonic() - begin))  # of some six seconds
    script = f"for pause in 0.1 0.1 1.3; do sleep $pause; kill -USR1 {os.getpid()}; done"
    heard.begin()
    try:
        sender = subprocess.Popen(["sh", "-c", script])
        begin = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)  # one call
        end = time.monotonic()
        sender.wait(timeout=20)
        time.sleep(0.2)
    finally:
        heard.end()
    assert [(kind, number) for kind, number, _ in calls] == [("first", signal.SIGUSR1), ("again", signal.SIGUSR1)]
    assert end - begin > 2, "a call that is longer than the signals take"
    assert calls[-1][2] < end, "not only after it"
    assert heard.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_c_locale_knows_all_letters() -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    asked = [sys.executable, "-m", "leanlm.train", "resume=карта", "--cfg", "job"]
    done = subprocess.run(asked, env=environment, capture_output=True, timeout=60)
    assert "resume: карта" in done.stdout.decode(), done.stderr.decode()
