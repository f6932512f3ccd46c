"""The edits that turn guards off fit today's source; `tests/support/guards.py` tries them, by hand."""

import ast

import pytest
from guards import GUARDS, Guard
from repository import REPOSITORY


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_an_edit_fits_the_source_and_its_tests_are_there(guard: Guard) -> None:
    source = (REPOSITORY / guard.file).read_text()
    off = guard.turned_off(source)
    assert ast.dump(ast.parse(off)) != ast.dump(ast.parse(source))
    for test in guard.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (REPOSITORY / file).read_text() or not name, test
    assert guard.tests


def test_a_guard_that_moved_is_missed() -> None:
    with pytest.raises(ValueError, match="holds 0 times"):
        Guard("none", "none.py", "absent", "", ()).turned_off("present")


def test_names_are_told_apart() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
