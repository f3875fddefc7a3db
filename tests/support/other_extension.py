"""A pytest plugin that puts another build of the extension in place of the installed one: see test_native_builds.py."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("adapterkern._C", os.environ["OTHER_EXTENSION"])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["adapterkern._C"] = module
spec.loader.exec_module(module)
