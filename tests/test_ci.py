"""CI notices every kind of skip that its list does not allow."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[1] / ".ci" / "check_skips.py"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_known():\n    assert 0\n"
SKIP = "import pytest\ndef test_one():\n    pytest.skip('no data')\n"
MODULE_SKIP = "import pytest\npytest.importorskip('no_such_module')\ndef test_any():\n    pass\n"


@pytest.mark.parametrize(
    ("source", "allowed", "code"),
    [
        ("def test_pass():\n    pass\n", "", 0),
        (EXPECTED_FAILURE, "", 0),
        (SKIP, "", 1),
        (SKIP, "# why\n*::test_one: *: no data\n", 0),
        (SKIP, "*::test_other: *", 1),
        (MODULE_SKIP, "", 1),
        (MODULE_SKIP, "*could not import 'no_such_module'*", 0),
        ("", "*", 1),  # nothing ran at all
    ],
)
def test_skips_are_checked(tmp_path: Path, source: str, allowed: str, code: int) -> None:
    (tmp_path / "test_sample.py").write_text(source, encoding="utf-8")
    (tmp_path / "allowed").write_text(allowed, encoding="utf-8")
    options = ["-p", "no:cacheprovider", f"--junitxml={tmp_path / 'report.xml'}"]
    subprocess.run([sys.executable, "-m", "pytest", *options, tmp_path], cwd=tmp_path, check=False, capture_output=True)
    check = [sys.executable, CHECK, tmp_path / "report.xml", tmp_path / "allowed"]
    assert subprocess.run(check, check=False, capture_output=True).returncode == code
