"""Settings of a run that each are right and do not go together, or not with the machine."""

from dataclasses import replace

import pytest
import torch

from flashtrain import config as configs
from flashtrain.errors import UserError
from flashtrain.recipes import RECIPES
from flashtrain.train import ranks
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--comm.timeout nan", "comm.timeout is nan; it must be a number of seconds above 0"),
        ("--comm.timeout inf", "comm.timeout is inf; it must be a number of seconds above 0"),
        ("--optimizer.learning_rate inf", "optimizer.learning_rate is inf; it must be finite"),
        ("--train.seed 18446744073709551616", "train.seed is 18446744073709551616; it must be below 2"),
    ],
)
def test_numbers_that_no_run_can_use_are_named(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        configs.resolve(RECIPES["demo"](), None, words.split()).validate(data=False)
    assert str(caught.value).startswith(message)


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made() -> None:
    RECIPES["demo"]().check_room(2)
    with pytest.raises(
        UserError, match=r"^a model of 70\.55 G parameters takes 131 GiB of this machine's memory "
    ):
        RECIPES["llama-70b"]().check_room(8)


def test_a_rank_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with (
        pytest.raises(
            UserError, match=r"there is no GPU for local rank 4, as this machine has 4: start fewer"
        ),
        ranks.joined(1.0),
    ):
        pytest.fail("it joined")
