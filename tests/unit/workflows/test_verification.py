"""What a reload gave goes into the manifest, whatever it was."""

import json
import math

from autocompress.workflows.export import Verification


def test_a_reload_that_is_not_finite_is_written_as_null_and_does_not_pass():
    rows = (("retained", 0.9, math.nan, False), ("storage_bytes", 10, 10, True))
    written = json.loads(json.dumps(Verification(rows).to_json(), allow_nan=False))
    assert not written["passed"]
    assert [check["reloaded"] for check in written["checks"]] == [None, 10]
    assert written["checks"][0]["claimed"] == 0.9
