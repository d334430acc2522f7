"""Options of commands that stand for a field."""

from typing import Any

import pytest

from distributed_mi import cli


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--force"], ["exemplars.force=true"]),
        (["exemplars.share=0.1", "--force"], ["exemplars.share=0.1", "exemplars.force=true"]),
        (["exemplars.share=0.1"], ["exemplars.share=0.1"]),
        ([], []),
    ],
)
def test_force_stands_for_a_field(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], overrides: list[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "run_stages", lambda *given: calls.append(given))
    assert cli.main(["exemplars", "quickstart", *arguments]) == 0
    assert calls == [("quickstart", overrides, ["exemplars"], "exemplars")]
