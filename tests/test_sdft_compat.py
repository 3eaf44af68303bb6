"""Names that other releases of transformers have for what is used here."""

import pytest

from sdft import _compat


def test_a_page_is_a_block_where_transformers_calls_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"page_size": 32, "auto_switch_to_flash": False, "num_blocks": 7}
    monkeypatch.setattr(_compat, "ContinuousBatchingConfig", dict)
    monkeypatch.setattr(_compat, "_PAGES_ARE_BLOCKS", True)
    assert _compat.batching_config(**given) == {"block_size": 32, "num_blocks": 7}
    monkeypatch.setattr(_compat, "_PAGES_ARE_BLOCKS", False)
    assert _compat.batching_config(**given) == given
