"""Settings of a run that each are right and do not go together."""

from dataclasses import replace

import pytest

from flashtrain.errors import UserError
from flashtrain.recipes import RECIPES
from flashtrain.train.settings import Training


@pytest.mark.parametrize(
    ("recipe", "train", "message"),
    [
        (
            "gqkva",
            Training(document_mask=True),
            "document_mask is true, but model.pairing knows no",
        ),
        (
            "flowhn",
            Training(document_mask=True),
            "document_mask is true, but model.layout knows no",
        ),
        ("epas", Training(document_mask=True), "document_mask is true, but model.sharing knows no"),
    ],
)
def test_settings_that_do_not_go_together_are_named(recipe: str, train: Training, message: str) -> None:
    config = replace(RECIPES[recipe](), train=train)
    with pytest.raises(UserError, match=f"^train.{message}") as caught:
        config.validate(data=False)
    assert "\n" not in str(caught.value)
