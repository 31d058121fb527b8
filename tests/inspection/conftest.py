"""The byte tokenizer and the row writer of the data tests, for the inspection tests."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("data_fixtures", Path(__file__).parents[1] / "data" / "conftest.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)

byte_tokenizer = _FIXTURES.byte_tokenizer
smol_tokenizer = _FIXTURES.smol_tokenizer
spm_tokenizer = _FIXTURES.spm_tokenizer
write_rows = _FIXTURES.write_rows
