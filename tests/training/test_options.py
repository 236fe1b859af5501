import pytest

from batchnorm.training.options import InputError, Options, default_epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"framework": "tensorflow"}, "--framework is tensorflow; it must be one of jax, torch"),
        ({"activation": "sigmoide"}, "--activation is sigmoide; it must be one of sigmoid, relu"),
        ({"dataset": "mnist"}, "--dataset is mnist; it must be one of digits, fashion-mnist"),
        ({"dataset": None}, "--dataset is None"),
        ({"data": "folder"}, "--dataset digits and --data folder exclude each other"),
        ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
        ({"batch_size": 1}, "--batch-size is 1; it must be at least 2: after a dense layer one image is its own mean"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be a positive number"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"learning_rate": float("inf")}, "--learning-rate is inf"),
        ({"seed": -1}, "--seed is -1; it must be between 0 and 4294967295"),
        ({"images": 31}, "--images is 31; it must be at least one batch, 32"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_fix(changes, message):
    with pytest.raises(InputError) as caught:
        Options(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_arguments_ask_for_the_same_options():
    assert Options().arguments() == ""
    assert Options(dataset="fashion-mnist", epochs=10).arguments() == "--dataset fashion-mnist"
    options = Options(activation="leaky_relu", batch_size=64, seed=2, dataset=None, data="my data", epochs=30)
    assert options.arguments() == "--activation leaky_relu --epochs 30 --batch-size 64 --seed 2 --data 'my data'"


def test_small_sets_get_more_epochs():
    assert default_epochs("digits", None) == Options().epochs == 30
    assert default_epochs("fashion-mnist", None) == default_epochs(None, "folder") == 10
