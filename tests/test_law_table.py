"""Each law is held by a test of the default run, whatever is left to longer ones."""

from tests.law_table import LAWS, marked_tests


def test_the_default_run_holds_every_law():
    assert {test.law for test in marked_tests() if test.run == "default"} == {*LAWS}
