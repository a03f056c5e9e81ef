from benchmarks.accounts import NUM_REQUESTS, bodies


def test_no_prompt_of_a_round_is_that_of_another_the_one_that_warms_up_included():
    prompts = [tuple(body["prompt"]) for number in range(-1, 24) for body in bodies(["base", "an-adapter"], number)]
    assert len(set(prompts)) == 25 * NUM_REQUESTS


def test_equal_rounds_are_equal():
    assert bodies(["base"], 3) == bodies(["base"], 3)
