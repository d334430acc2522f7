"""Every error survives the way between processes."""

import pickle

import pytest

from distributed_mi.core import errors

CLASSES = sorted(
    (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)),
    key=lambda c: c.__name__,
)


def test_the_tree_is_not_empty() -> None:
    assert len(CLASSES) > 5
    assert all(issubclass(c, errors.DistributedMIError) for c in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_error_survives_pickling(cls: type[errors.DistributedMIError]) -> None:
    original = cls("users: 3 of 7 failed.\n  Next step: ...")
    original.__cause__ = ValueError("cause")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is cls
    assert str(copy) == str(original)
    assert copy.exit_code == original.exit_code


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_configuration_errors_exit_with_2_and_others_with_1(cls: type[errors.DistributedMIError]) -> None:
    assert cls.exit_code == (2 if issubclass(cls, errors.ConfigError) else 1)
    assert cls.__doc__


def test_the_own_error_is_found_behind_wrappers() -> None:
    class WrappedError(RuntimeError, errors.InputError):
        """As Ray makes it: of both classes."""

    found = errors.own_error(WrappedError("users.csv, row 3"))
    assert type(found) is errors.InputError
    assert str(found) == "users.csv, row 3"

    outer, held = RuntimeError("outer"), RuntimeError("held")
    held.cause = errors.StageError("in the attribute")  # type: ignore[attr-defined]
    outer.__cause__ = held
    assert str(errors.own_error(outer)) == "in the attribute"

    other = ValueError("not ours")
    assert errors.own_error(other) is other
