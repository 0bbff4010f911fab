import gc
from contextlib import suppress

import pytest

from mlu_lightning.utilities.garbage import collected_later


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, KeyError])
def test_collection_is_as_before_afterwards(enabled: bool, error: type[Exception] | None) -> None:
    if not enabled:
        gc.disable()
    try:
        with suppress(KeyError), collected_later():
            assert not gc.isenabled()
            if error is not None:
                raise error
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
