"""The user's options over the model's own over the task's defaults; and the shared option values."""

import pytest
from transformers import GenerationConfig

from llmcli.errors import UsageError
from llmcli.io.units import parse_size
from llmcli.models import generation
from llmcli.options import parse_key_value
from llmcli.tasks.generated import SAMPLING

DEFAULTS = SAMPLING | {"max_new_tokens": 128}


def merged(model: dict, **explicit):
    return generation.merge(GenerationConfig(**model), explicit, DEFAULTS)


def test_where_all_are_silent_the_task_samples():
    config = merged({})
    assert (config.do_sample, config.temperature, config.top_p, config.max_new_tokens) == (True, 0.8, 0.95, 128)


def test_the_models_own_configuration_stands():
    config = merged({"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [7, 8]})
    assert (config.temperature, config.top_k, config.top_p, config.eos_token_id) == (0.6, 20, 0.95, [7, 8])


def test_the_user_has_the_last_word():
    config = merged({"do_sample": True, "temperature": 0.6}, temperature=1.2, max_new_tokens=5)
    assert (config.temperature, config.max_new_tokens) == (1.2, 5)


def test_greedy_forgets_the_sampling_parameters():
    config = merged({"do_sample": True, "temperature": 0.6, "top_k": 20}, do_sample=False)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (False, None, None, None)


def test_beams_do_not_sample_unless_asked():
    assert not merged({}, num_beams=4).do_sample
    assert merged({}, num_beams=4, temperature=0.5).do_sample


def test_asking_for_a_sampling_parameter_asks_for_sampling():
    assert merged({"do_sample": False}, top_k=5).do_sample


def test_the_task_says_how_many_tokens_are_enough_not_the_model():
    config = merged({"max_length": 20, "max_new_tokens": 7})
    assert (config.max_length, config.max_new_tokens) == (None, 128)


def test_a_models_own_beams_do_not_sample():
    assert not merged({"num_beams": 4}).do_sample
    assert merged({"num_beams": 4, "do_sample": True}).do_sample


def test_sampling_is_by_temperature_and_nucleus_alone():
    assert merged({}).top_k == 0


def test_unknown_and_impossible_options():
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        generation.check({"temprature": 1}, DEFAULTS)
    with pytest.raises(UsageError, match="num_return_sequences"):
        generation.check({"num_return_sequences": 2, "do_sample": False}, DEFAULTS)
    generation.check({"num_return_sequences": 2}, DEFAULTS)
    for name, value in (("top_k", "abc"), ("temperature", "hot"), ("num_beams", True), ("num_return_sequences", None)):
        with pytest.raises(UsageError, match=f"invalid {name} .*: expected a number"):
            generation.check({name: value}, DEFAULTS)


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_totals_would_depend_on_the_padding(name):
    with pytest.raises(UsageError, match="includes the prompt"):
        generation.check({name: 20}, DEFAULTS)


def test_whole_numbers_do_for_fractions():
    assert merged({}, repetition_penalty=5).repetition_penalty == 5.0


@pytest.mark.parametrize(
    ("item", "value"),
    [("top_k=5", 5), ("min_p=0.1", 0.1), ("use_cache=false", False), ("use_cache=False", False), ("a=b=c", "b=c"),
     ("eos_token_id=[1,2]", [1, 2]), ("cache_implementation=static", "static")],
)  # fmt: skip
def test_key_value(item, value):
    assert parse_key_value(item) == (item.partition("=")[0], value)


def test_sizes():
    assert [parse_size(text) for text in ("8GB", "1.5g", "2GiB", "100")] == [8 * 10**9, 1_500_000_000, 2**31, 100]
    with pytest.raises(UsageError, match="invalid size"):
        parse_size("much")


def test_max_length_of_the_user_counts_whatever_its_value():
    for length in (19, 20, 21):
        config = generation.merge(
            GenerationConfig(max_length=142), {"max_length": length}, DEFAULTS, counts_prompt=False
        )
        assert (config.max_length, config.max_new_tokens) == (length, None)


def test_max_length_that_transformers_4_wrote_does_not_count():
    config = generation.merge(GenerationConfig(max_length=20), {}, DEFAULTS, counts_prompt=False)
    assert (config.max_length, config.max_new_tokens) == (None, 128)


def test_settings_of_the_task_come_before_the_model():
    config = generation.merge(
        GenerationConfig(max_new_tokens=9, num_beams=2), {}, DEFAULTS, {"max_length": 30, "num_beams": 3},
        counts_prompt=False,
    )  # fmt: skip
    assert (config.max_length, config.max_new_tokens, config.num_beams) == (30, None, 3)


def test_unknown_option_names_its_source():
    with pytest.raises(UsageError, match=r"^org/name: task_specific_params: unknown generation option 'beams'"):
        generation.check_known(["beams"], "org/name: task_specific_params")
