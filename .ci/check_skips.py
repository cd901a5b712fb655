"""Fails when a test was skipped for a reason that the list does not allow.

Usage: check_skips.py JUNIT_XML ALLOWED_SKIPS
"""

import fnmatch
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(report: str, allowed_skips: str) -> int:
    """Prints every skip of the report that no pattern allows; returns the exit status."""
    lines = Path(allowed_skips).read_text(encoding="utf-8").splitlines()
    allowed = [line for line in lines if line and not line.startswith("#")]
    cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it a moment ago
    if not cases:
        print("no test ran")
        return 1
    # A module skipped as a whole has no type and its reason in the text only; an expected failure is no skip.
    skips = [
        f"{case.get('classname')}::{case.get('name')}: {skip.text}"
        for case in cases
        for skip in case.iter("skipped")
        if skip.get("type") != "pytest.xfail"
    ]
    refused = [skip for skip in skips if not any(fnmatch.fnmatchcase(skip, pattern) for pattern in allowed)]
    for skip in refused:
        print(f"skip that .ci/allowed_skips does not list: {skip}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
