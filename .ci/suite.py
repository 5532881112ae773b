"""Run pytest, then once more what failed: python .ci/suite.py [ARGUMENTS OF PYTEST]

Some tests measure time, and the machine is shared. One that passes the second time is flaky: it is named in a line of
its own, "flaky: ...", which .ci/run counts. All else stays a failure: a test that fails again, an error in collection,
a run that was cut short, one without any test.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 5  # more is not by chance
LIMIT = 900  # seconds


def run(*arguments):
    """Run pytest; return its exit status and the names of the tests that failed, as pytest itself remembers them."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *arguments]
        try:
            status = subprocess.call(command, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            print(f"the tests did not end within {LIMIT} seconds", flush=True)
            return 124, []
        remembered = Path(cache, "v", "cache", "lastfailed")
        return status, sorted(json.loads(remembered.read_text())) if remembered.exists() else []


def main(arguments):
    status, failed = run(*arguments)
    if status != 1 or not 0 < len(failed) <= MOST:  # pytest gives 1 where tests ran and some failed
        return status
    print("running again what failed:", *failed, sep="\n  ", flush=True)
    status, _ = run(*arguments, *failed)  # by name: a name that is gone is an error, and selects nothing else
    if status == 0:
        print(*(f"flaky: {name}" for name in failed), sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
